"""The student: merged factors on the frozen base, and how far it is from the teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthomerge.factors import LoraFactors
from orthomerge.training.distillation.batches import Pass, Place
from orthomerge.training.distillation.forms import Given, Installed, Taught, text_means
from orthomerge.training.distillation.updates import Added


class Distances(NamedTuple):
    """Per text: the answers' error and the hidden states'; and by task what the student said."""

    answers: Float[Tensor, " rows"]
    hidden: Float[Tensor, " rows"]
    said: dict[int, Tensor]


class Classroom:
    """The base, the texts of every task as tokens, and what the teachers said of them.

    The loss of a text is its answer's error and `hidden_weight` times that of its hidden states.
    """

    def __init__(
        self, where: Installed, taught: Sequence[Taught], hidden_weight: float, rows: int
    ) -> None:
        self.form, self._adder, self.device = where
        self.taught, self._weight, self._rows = taught, hidden_weight, rows
        self.lengths = [[t.length(row) for row in range(len(t.counts))] for t in taught]
        self._variance = [_variance(t.hidden) for t in taught]

    def inputs(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Texts as one batch of model inputs."""
        found = self.form.collate([self.taught[t].examples[r] for t, r in places])
        return {key: value.to(self.device) for key, value in found.items()}

    def states(self, inputs: Mapping[str, Tensor], update: Mapping[str, Added]) -> Any:
        """The output of the base with an update."""
        with self._adder.using(update):
            return self.form.backbone.states(inputs)

    def losses(self, found: Distances) -> Float[Tensor, " rows"]:
        """The loss of every text."""
        return found.answers + self._weight * found.hidden

    def distances(self, places: Sequence[Place], update: Mapping[str, Added]) -> Distances:
        """How far the base with an update is from the teachers on these texts."""
        inputs = self.inputs(places)
        with self._adder.using(update):
            states = self.form.backbone.states(inputs)
            hidden = self._hidden(states, inputs, places)
            answers = hidden.new_zeros(len(places))
            said: dict[int, Tensor] = {}
            for task in dict.fromkeys(place.task for place in places):
                here = [i for i, place in enumerate(places) if place.task == task]
                rows = torch.tensor(here, device=self.device)
                given = Given(states, inputs, rows, [places[i].row for i in here])
                found = self.form.compare(task, given, self.taught[task])
                said[task] = found.said
                answers = answers.index_add(0, rows, found.errors.to(answers))
        return Distances(answers, hidden, said)

    def _hidden(
        self, states: Any, inputs: Mapping[str, Tensor], places: Sequence[Place]
    ) -> Float[Tensor, " rows"]:
        """The mean squared error over a text's tokens, relative to the teacher's variance."""
        device = self.device
        target = torch.cat([self.taught[t].hidden[self.taught[t].tokens(r)] for t, r in places])
        counts = torch.tensor([self.taught[t].counts[r] for t, r in places], device=device)
        said = states.last_hidden_state[self.form.counted(inputs)]
        error = (said.float() - target.to(device).float()).pow(2).mean(dim=-1)
        scale = torch.tensor([self._variance[t] for t, _ in places], device=device)
        return text_means(error, counts) / scale

    def chunks(self, places: Sequence[Place]) -> list[list[Place]]:
        """Texts of like length that are measured together."""
        order = sorted(places, key=lambda p: self.lengths[p.task][p.row])
        return [order[at : at + self._rows] for at in range(0, len(order), self._rows)]

    def mean_loss(self, places: Sequence[Place], update: Mapping[str, Added]) -> float:
        """The mean loss over texts, each with the same weight."""
        total = 0.0
        for chunk in self.chunks(places):
            with torch.no_grad():
                total += float(self.losses(self.distances(chunk, update)).sum())
        return total / len(places)


def _variance(hidden: Tensor) -> float:
    """The mean variance of an entry over tokens."""
    return max(float(hidden.float().var(dim=0, correction=0).mean()), 1e-12)


class Student(nn.Module):
    """The merged factors as parameters; the base is not among the module's own weights.

    So optimizers, checkpoints and processes see the factors alone. The forward pass gives the loss
    of a pass, `Σ w_text loss_text`.
    """

    def __init__(self, classroom: Classroom, layers: Mapping[str, LoraFactors]) -> None:
        super().__init__()
        self._classroom = [classroom]  # a list hides it from the module
        self._names = list(layers)
        held = [layers[name].to(classroom.device, torch.float32) for name in self._names]
        self.A = nn.ParameterList([f.A.clone(memory_format=torch.contiguous_format) for f in held])
        self.B = nn.ParameterList([(f.B * f.scaling).contiguous() for f in held])

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
        """The loss of a pass."""
        (room,) = self._classroom
        found = room.losses(room.distances(work.places, self.update))
        return {"loss": found.new_tensor(work.weights) @ found}
