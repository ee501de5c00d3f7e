"""Tasks with heads: each adapter's head on the shared backbone, and what its outputs are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from orthomerge.adapters.checkpoint import read_checkpoint
from orthomerge.errors import AdapterError
from orthomerge.models.assets import ResolvedModel
from orthomerge.models.loading import (
    agree_on_padding,
    another_head,
    load_classifier,
    load_tagger,
)
from orthomerge.training.distillation.backbone import Backbone, rows_of
from orthomerge.training.distillation.forms import Compared, Form, Given, Taught, text_means
from orthomerge.training.distillation.teachers import Teacher

MAX_LENGTH = 48
_TAGGER = "TOKEN_CLS"


class Heads(Form):
    """One base with the head of every task, all of them frozen.

    Raises:
        AdapterError: a head that is missing or does not fit the base, modules inside the backbone,
            which tasks that share one backbone cannot have each its own, or taggers together with
            classifiers.
        AssetError: the base cannot be loaded.
    """

    def __init__(
        self,
        base: ResolvedModel,
        tokenizer: Any,
        teachers: Sequence[Teacher],
        max_length: int | None,
    ) -> None:
        for teacher in teachers:
            _require_head(teacher)
        kinds = {t.kind for t in teachers if t.kind} or {"SEQ_CLS"}
        if len(kinds) > 1:
            raise AdapterError(
                f"these adapters are of several kinds ({', '.join(sorted(kinds))}): distill those "
                "of one kind together."
            )
        self.tagger = kinds == {_TAGGER}
        self.tokenizer, self.max_length = tokenizer, max_length or MAX_LENGTH
        self.problems = [t.problem for t in teachers]
        load: Any = load_tagger if self.tagger else load_classifier
        model = load(base.path_or_id, num_labels=teachers[0].outputs, name=base.name)
        self.model = agree_on_padding(model.eval(), tokenizer).requires_grad_(False)
        self.backbone = Backbone(self.model)
        self._heads: list[Any] = []
        stored = read_checkpoint(Path(base.path_or_id)).tensors
        known = {n: t.clone() for n, t in self._above().items() if n in stored}
        for place, teacher in enumerate(teachers):
            head = self.model
            if place:
                head = another_head(self.model, num_labels=teacher.outputs, regression=False)
            _load_head(head, teacher, known)
            self._heads.append(head.eval().requires_grad_(False))

    def _above(self) -> dict[str, Tensor]:
        """The weights that are not of the backbone."""
        inside = f"{self.model.base_model_prefix}."
        return {n: t for n, t in self.model.state_dict().items() if not n.startswith(inside)}

    def to(self, device: torch.device) -> None:
        """Move the base and the heads."""
        for head in self._heads:
            head.to(device)

    def identity(self, task: int) -> dict[str, Any]:
        """What a teacher's answers depend on besides the adapter, the base and the texts."""
        return {"form": "tagger" if self.tagger else "classifier", "max_length": self.max_length}

    def answers(self, task: int, states: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of one task's head for every text; for a tagger one for every token."""
        said = self._said(task, states, inputs)
        if not self.tagger:
            return list(said[:, None])
        return [row[mask] for row, mask in zip(said, self.counted(inputs), strict=True)]

    def _said(self, task: int, states: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.backbone.read(self._heads[task], states, inputs).logits.float()

    def compare(self, task: int, given: Given, taught: Taught) -> Compared:
        """The student's outputs against the teacher's; a tagger's by token, their mean by text."""
        inputs = {key: value.index_select(0, given.rows) for key, value in given.inputs.items()}
        said = self._said(task, rows_of(given.states, given.rows), inputs)
        target = torch.cat([self._kept(taught, text) for text in given.texts]).to(said)
        spread = _spread(taught.answers) if self.problems[task] == "regression" else 1.0
        if not self.tagger:
            return Compared(output_errors(self.problems[task], said, target, spread), said)
        mask = self.counted(inputs)
        errors = output_errors(self.problems[task], said[mask], target, spread)
        return Compared(text_means(errors, mask.sum(dim=1)), said[mask])

    def _kept(self, taught: Taught, text: int) -> Tensor:
        return taught.answers[taught.tokens(text) if self.tagger else slice(text, text + 1)]

    def agreement(self, task: int, said: Tensor, taught: Taught, texts: Sequence[int]) -> float:
        """See `outputs_agree`."""
        target = torch.cat([self._kept(taught, text) for text in texts])
        return outputs_agree(self.problems[task], said, target)


def output_errors(
    problem: str,
    said: Float[Tensor, "n outputs"],
    target: Float[Tensor, "n outputs"],
    spread: float,
) -> Float[Tensor, " n"]:
    """How far a student's outputs are from the teacher's.

    `KL(teacher ‖ student)` in nats, of classes or of independent labels (their mean); for a
    regression the squared error relative to `spread`, the variance of the teacher's outputs.
    """
    if problem == "regression":
        return ((said - target) ** 2).mean(dim=1) / spread
    if problem == "multi_label_classification":
        p = target.sigmoid()
        own = F.binary_cross_entropy_with_logits(target, p, reduction="none")
        return (F.binary_cross_entropy_with_logits(said, p, reduction="none") - own).mean(dim=1)
    log = target.log_softmax(dim=-1)
    return (log.exp() * (log - said.log_softmax(dim=-1))).sum(dim=-1)


def outputs_agree(problem: str, said: Tensor, target: Tensor) -> float:
    """How well outputs agree: the share of the same class, or of the same labels.

    For a regression it is Pearson's correlation of the values, 0 where one side is constant
    or there is one value.
    """
    if problem == "regression":
        pair = torch.stack([said.double().flatten(), target.double().flatten()])
        if pair.shape[1] < 2:
            return 0.0
        return float(torch.corrcoef(pair)[0, 1].nan_to_num())
    if problem == "multi_label_classification":
        return float(((said > 0) == (target > 0)).float().mean())
    return float((said.argmax(dim=-1) == target.argmax(dim=-1)).float().mean())


def _spread(target: Tensor) -> float:
    """The variance of values; where they hardly vary, what a float can still tell of them."""
    wide = target.double()
    least = 1e-6 * float((wide**2).mean())
    return max(float(wide.var(dim=0, correction=0).mean()), least, 1e-12)


def _require_head(teacher: Teacher) -> None:
    if not teacher.head:
        raise AdapterError(
            f"'{teacher.adapter.called}' carries no head, so its answers are not known: train it "
            "with modules_to_save naming the classification head."
        )


def _load_head(model: Any, teacher: Teacher, known: Mapping[str, Tensor]) -> None:
    """Put a task's head on a model; `known` is what the base itself has above its backbone."""
    inside, own = f"{model.base_model_prefix}.", model.state_dict()
    called = teacher.adapter.called
    for name, tensor in teacher.head.items():
        if name.startswith(inside):
            raise AdapterError(
                f"'{called}' trained '{name}' itself (modules_to_save), which all tasks share: "
                "only heads on top of the backbone can be held for each task."
            )
        if name not in own or own[name].shape != tensor.shape:
            there = list(own[name].shape) if name in own else "missing"
            raise AdapterError(
                f"head '{name}' {list(tensor.shape)} of '{called}' does not fit the model "
                f"({there}): it belongs to another model."
            )
    fitting = {n: t for n, t in known.items() if n in own and own[n].shape == t.shape}
    whole = {**fitting, **teacher.head}
    missing = [n for n in own if not n.startswith(inside) and n not in whole]
    if missing:
        raise AdapterError(
            f"'{called}' carries no '{missing[0]}', a part of its head, and the base has none: "
            "train it with modules_to_save naming the whole head."
        )
    model.load_state_dict(whole, strict=False)
