"""Embedding models: the pooled vector of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from orthomerge.errors import MergeError, unknown_name
from orthomerge.io.documents import Unreadable, read_json
from orthomerge.models.assets import ResolvedModel
from orthomerge.models.loading import agree_on_padding, load_backbone
from orthomerge.training.distillation.backbone import Backbone
from orthomerge.training.distillation.forms import Compared, Form, Given, Taught, refuse_modules
from orthomerge.training.distillation.settings import POOLINGS
from orthomerge.training.distillation.teachers import Teacher

MAX_LENGTH = 128
_FILE = "1_Pooling/config.json"  # where Sentence Transformers keeps it
_KEYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls",
         "pooling_mode_lasttoken": "last"}  # fmt: skip


class Vectors(Form):
    """An embedding model: no head, one vector a text.

    Raises:
        AdapterError: an adapter with modules of its own.
        MergeError: no such pooling, or one of the base that is not known.
        AssetError: the base cannot be loaded.
    """

    def __init__(
        self,
        base: ResolvedModel,
        tokenizer: Any,
        teachers: Sequence[Teacher],
        max_length: int | None,
        pooling: str | None,
    ) -> None:
        for teacher in teachers:
            refuse_modules(teacher)
        self.pooling = pooling or _pooling_of(Path(base.path_or_id))
        if self.pooling not in POOLINGS:
            raise unknown_name("pooling", self.pooling, POOLINGS, error=MergeError)
        self.tokenizer, self.max_length = tokenizer, max_length or MAX_LENGTH
        self.model = agree_on_padding(load_backbone(base.path_or_id).eval(), tokenizer)
        self.model.requires_grad_(False)
        self.backbone = Backbone(self.model)

    def identity(self, task: int) -> dict[str, Any]:
        """What a teacher's answers depend on besides the adapter, the base and the texts."""
        return {"form": "embedding", "max_length": self.max_length, "pooling": self.pooling}

    def answers(self, task: int, states: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The vector of every text."""
        return list(self._pooled(states.last_hidden_state, self.counted(inputs))[:, None])

    def _pooled(
        self, hidden: Float[Tensor, "rows length d"], mask: Tensor
    ) -> Float[Tensor, "rows d"]:
        wide = hidden.float()
        if self.pooling == "cls":
            return wide[:, 0]
        counts = mask.sum(dim=1)
        if self.pooling == "last":
            return wide[torch.arange(len(wide), device=wide.device), counts - 1]
        return (wide * mask[..., None]).sum(dim=1) / counts[:, None]

    def compare(self, task: int, given: Given, taught: Taught) -> Compared:
        """The squared error of the vectors, relative to the variance of the teacher's."""
        mask = self.counted(given.inputs)
        said = self._pooled(given.states.last_hidden_state, mask).index_select(0, given.rows)
        target = taught.answers[list(given.texts)].to(said)
        variance = max(float(taught.answers.var(dim=0, correction=0).mean()), 1e-12)
        return Compared((said - target).pow(2).mean(dim=1) / variance, said)

    def agreement(self, task: int, said: Tensor, taught: Taught, texts: Sequence[int]) -> float:
        """The mean cosine of the two vectors of a text."""
        return float(F.cosine_similarity(said, taught.answers[list(texts)].to(said)).mean())


def _pooling_of(base: Path) -> str:
    """How the base's folder says that it pools; the mean where it does not say.

    Raises:
        MergeError: it pools in a way that is not known here.
    """
    try:
        said = read_json(base / _FILE)
    except (Unreadable, OSError):
        return "mean"
    on = [
        key
        for key, value in dict(said).items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if not on:
        return "mean"
    if len(on) > 1 or on[0] not in _KEYS:
        raise MergeError(
            f"'{base / _FILE}' pools by {', '.join(on)}, which is not known: name the pooling with "
            f"pooling (--pooling), one of {', '.join(POOLINGS)}."
        )
    return _KEYS[on[0]]
