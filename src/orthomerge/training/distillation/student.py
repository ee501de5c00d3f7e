"""The student: merged factors on the frozen base, and how far it is from the teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthomerge.factors import LoraFactors
from orthomerge.training.distillation.batches import Pass, Place, Targets
from orthomerge.training.distillation.updates import Added, Adder


class Distances(NamedTuple):
    """Per text: the answers' error, the hidden states', and what the student said, by task."""

    answers: Float[Tensor, " rows"]
    hidden: Float[Tensor, " rows"]
    said: dict[int, Tensor]


class Classroom:
    """The base, the texts of every task as tokens, and what the teachers said of them."""

    def __init__(
        self,
        form: Any,
        adder: Adder,
        examples: Sequence[Sequence[Mapping[str, Any]]],
        targets: Sequence[Targets],
        device: torch.device,
    ) -> None:
        self.form, self.adder, self.device = form, adder, device
        self.examples, self.targets = examples, targets
        self.lengths = [[len(e["input_ids"]) for e in task] for task in examples]
        self._variance = [_variance(t.hidden) for t in targets]
        self._spread = [form.spread(i, t.answers) for i, t in enumerate(targets)]

    def distances(self, places: Sequence[Place], update: Mapping[str, Added]) -> Distances:
        """How far the base with an update is from the teachers on these texts."""
        inputs = self.form.collate([self.examples[t][r] for t, r in places])
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        with self.adder.using(update):
            states = self.form.backbone.states(inputs)
            hidden = self._hidden(states, inputs, places)
            answers = hidden.new_zeros(len(places))
            said: dict[int, Tensor] = {}
            for task in dict.fromkeys(place.task for place in places):
                here = [i for i, place in enumerate(places) if place.task == task]
                rows = torch.tensor(here, device=self.device)
                target = self.targets[task].answers[[places[i].row for i in here]]
                said[task] = self.form.answers(task, states, inputs, rows)
                error = self.form.errors(
                    task, said[task], target.to(said[task]), self._spread[task]
                )
                answers = answers.index_add(0, rows, error)
        return Distances(answers, hidden, said)

    def _hidden(
        self, states: Any, inputs: Mapping[str, Tensor], places: Sequence[Place]
    ) -> Float[Tensor, " rows"]:
        """The mean squared error over a text's tokens, relative to the teacher's variance."""
        target = torch.cat([self.targets[t].hidden_of([r]) for t, r in places]).to(self.device)
        counts = torch.tensor([self.targets[t].counts[r] for t, r in places], device=self.device)
        mask = inputs["attention_mask"].bool()
        error = (states.last_hidden_state[mask].float() - target.float()).pow(2).mean(dim=-1)
        owner = torch.repeat_interleave(torch.arange(len(places), device=self.device), counts)
        sums = error.new_zeros(len(places)).index_add(0, owner, error)
        scale = torch.tensor([self._variance[t] for t, _ in places], device=self.device)
        return sums / (counts * scale)


def _variance(hidden: Tensor) -> float:
    """The mean variance of an entry over tokens."""
    return max(float(hidden.float().var(dim=0, correction=0).mean()), 1e-12)


class Student(nn.Module):
    """The merged factors as parameters; the base is not among the module's own weights.

    So optimizers, checkpoints and processes see the factors alone. The forward pass gives the loss
    `Σ w_text (answers + hidden_weight · hidden)` of a pass.
    """

    def __init__(
        self, classroom: Classroom, layers: Mapping[str, LoraFactors], hidden_weight: float
    ) -> None:
        super().__init__()
        self._classroom = [classroom]  # a list hides it from the module
        self._names, self._weight = list(layers), hidden_weight
        held = [layers[name].to(classroom.device, torch.float32) for name in self._names]
        self.A = nn.ParameterList([f.A.clone() for f in held])
        self.B = nn.ParameterList([f.B * f.scaling for f in held])

    @property
    def update(self) -> dict[str, Added]:
        """The factors by layer, as they are added."""
        return {n: Added(a, b) for n, a, b in zip(self._names, self.A, self.B, strict=True)}

    def layers(self) -> dict[str, LoraFactors]:
        """The factors by layer, detached, on the CPU."""
        return {
            n: LoraFactors(u.A.detach().cpu().clone(), u.B.detach().cpu().clone())
            for n, u in self.update.items()
        }

    def forward(self, work: Pass) -> dict[str, Tensor]:
        """The loss of a pass, and its two parts."""
        found = self._classroom[0].distances(work.places, self.update)
        weights = found.answers.new_tensor(work.weights)
        answers, hidden = weights @ found.answers, weights @ found.hidden
        return {"loss": answers + self._weight * hidden}
