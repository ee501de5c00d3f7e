"""Tasks with heads: each adapter's head on the shared backbone, and what its outputs are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from orthomerge.errors import AdapterError
from orthomerge.models.assets import ResolvedModel
from orthomerge.models.loading import agree_on_padding, another_head, encode, load_classifier
from orthomerge.training.distillation.backbone import Backbone, rows_of
from orthomerge.training.distillation.teachers import Teacher


class Heads:
    """One base with the head of every task, all of them frozen.

    Raises:
        AdapterError: a head that does not fit the base, or modules inside the backbone, which
            tasks that share one backbone cannot have each its own.
        AssetError: the base cannot be loaded.
    """

    def __init__(
        self, base: ResolvedModel, tokenizer: Any, teachers: Sequence[Teacher], max_length: int
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.problems = [t.problem for t in teachers]
        first = load_classifier(
            base.path_or_id, num_labels=teachers[0].outputs, name=base.name
        ).eval()
        self.model = agree_on_padding(first, tokenizer).requires_grad_(False)
        self.backbone = Backbone(self.model)
        self._heads: list[Any] = []
        for place, teacher in enumerate(teachers):
            _check_head(self.model, teacher)
            head = self.model
            if place:
                head = another_head(self.model, num_labels=teacher.outputs, regression=False)
            _load_head(head, teacher)
            self._heads.append(head.eval().requires_grad_(False))

    def to(self, device: torch.device) -> Heads:
        """The same on a device."""
        for head in self._heads:
            head.to(device)
        return self

    def encode(self, task: int, texts: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
        """Texts as token ids."""
        return encode(self.tokenizer, texts, self.max_length)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Texts as one batch, padded on the right."""
        return dict(self.tokenizer.pad(list(examples), padding_side="right", return_tensors="pt"))

    def answers(
        self, task: int, states: Any, inputs: Mapping[str, Tensor], rows: Tensor
    ) -> Float[Tensor, "rows outputs"]:
        """What one task's head makes of some rows of the backbone's output, in float32."""
        part = rows_of(states, rows)
        given = {key: value.index_select(0, rows) for key, value in inputs.items()}
        return self.backbone.read(self._heads[task], part, given).logits.float()

    def errors(
        self, task: int, said: Tensor, target: Tensor, spread: float
    ) -> Float[Tensor, " rows"]:
        """How far the student's outputs are from the teacher's, for every row.

        `KL(teacher ‖ student)` in nats, of classes or of independent labels (their mean); for a
        regression the squared error relative to `spread`, the variance of the teacher's outputs.
        """
        problem = self.problems[task]
        if problem == "regression":
            return ((said - target) ** 2).mean(dim=1) / spread
        if problem == "multi_label_classification":
            p = target.sigmoid()
            own = F.binary_cross_entropy_with_logits(target, p, reduction="none")
            return (F.binary_cross_entropy_with_logits(said, p, reduction="none") - own).mean(dim=1)
        log = target.log_softmax(dim=-1)
        return (log.exp() * (log - said.log_softmax(dim=-1))).sum(dim=-1)

    def spread(self, task: int, target: Tensor) -> float:
        """The variance of a regression's outputs over the texts; 1 for classes."""
        if self.problems[task] != "regression":
            return 1.0
        return _floored(target)

    def agreement(self, task: int, said: Tensor, target: Tensor) -> float:
        """How well student and teacher agree over texts: 1 is the same answers.

        The share of the same class, of the same labels, or for a regression the correlation
        (Pearson's) of the values; 0 where one side is constant.
        """
        problem = self.problems[task]
        if problem == "regression":
            pair = torch.stack([said.double().flatten(), target.double().flatten()])
            value = float(torch.corrcoef(pair)[0, 1])
            return value if value == value else 0.0
        if problem == "multi_label_classification":
            return float(((said > 0) == (target > 0)).float().mean())
        return float((said.argmax(dim=-1) == target.argmax(dim=-1)).float().mean())


def _floored(target: Tensor) -> float:
    """The variance of values, and what a float can tell of them where they hardly vary."""
    wide = target.double()
    least = 1e-6 * float((wide**2).mean())
    return max(float(wide.var(dim=0, correction=0).mean()), least, 1e-12)


def _check_head(model: Any, teacher: Teacher) -> None:
    inside = f"{model.base_model_prefix}."
    for name in teacher.head:
        if name.startswith(inside):
            raise AdapterError(
                f"'{teacher.adapter.called}' trained '{name}' itself (modules_to_save), which all "
                "tasks share: only heads on top of the backbone can be held for each task."
            )


def _load_head(model: Any, teacher: Teacher) -> None:
    own = model.state_dict()
    for name, tensor in teacher.head.items():
        if name not in own or own[name].shape != tensor.shape:
            there = list(own[name].shape) if name in own else "missing"
            raise AdapterError(
                f"head '{name}' {list(tensor.shape)} of '{teacher.adapter.called}' does not fit "
                f"the model ({there}): it belongs to another model."
            )
    model.load_state_dict(dict(teacher.head), strict=False)
