"""What the attacks of `benchmarks.privacy` work on: features by text, and what a file tells.

A file is made by the classes that the library writes files from (`Representation`, `published`), so
that what is attacked is what a team would publish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthomerge.moments import MeanMoment, Moment, Representation
from orthomerge.statistics import collect_statistics
from orthomerge.statistics.publish import published

LAYERS = 6


@dataclass(frozen=True)
class Texts:
    """Rows of several texts, one tensor a layer; text i owns rows `start[i]` to `start[i + 1]`."""

    rows: list[Tensor]
    start: Tensor
    ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, chosen: Sequence[int]) -> Texts:
        """These texts, in this order."""
        lengths = [int(self.start[i + 1] - self.start[i]) for i in chosen]
        index = torch.cat(
            [torch.arange(int(self.start[i]), int(self.start[i + 1])) for i in chosen]
        )
        start = torch.tensor([0, *lengths]).cumsum(0)
        return Texts([r[index] for r in self.rows], start, [self.ids[i] for i in chosen])

    def means(self) -> Texts:
        """One row a text, its mean over tokens: granularity `sample`."""
        start = torch.arange(len(self) + 1)
        return Texts([self.per_text(r, mean=True) for r in self.rows], start, self.ids)

    def per_text(self, values: Tensor, mean: bool = False) -> Tensor:
        """The sum (or mean) of rows, or of one number a row, over every text."""
        lengths = self.start.diff()
        owner = torch.repeat_interleave(torch.arange(len(self)), lengths)
        total = values.new_zeros(len(self), *values.shape[1:]).index_add_(0, owner, values)
        return total / lengths.reshape(-1, *[1] * (values.ndim - 1)) if mean else total


def encode(model: nn.Module, tokenizer, texts: Sequence[str], batch: int = 32) -> Texts:
    """The inputs of every query layer, padding left out, texts in their order."""
    ids = [tokenizer(t, truncation=True, max_length=128)["input_ids"] for t in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    held: list[dict[int, Tensor]] = [{} for _ in range(LAYERS)]
    seen: list[Tensor] = []
    hooks = [
        layer.attention.self.query.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
        for layer in model.encoder.layer
    ]
    try:
        for begin in range(0, len(order), batch):
            now = order[begin : begin + batch]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in now]}, return_tensors="pt")
            seen.clear()
            with torch.no_grad():
                model(**inputs)
            for layer, features in enumerate(seen):
                for k, i in enumerate(now):
                    held[layer][i] = features[k, : len(ids[i])].clone()
    finally:
        for hook in hooks:
            hook.remove()
    start = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return Texts([torch.cat([h[i] for i in range(len(ids))]) for h in held], start, ids)


class Form(NamedTuple):
    """What a team publishes: granularity, representation, and how much of it."""

    granularity: str = "token"
    kind: str = "full"
    directions: int | None = None
    noise: float = 0.0

    def name(self) -> str:
        """In the words of the command line."""
        said = "" if self.granularity == "task_mean" else self.kind
        if self.directions:
            said += f", {self.directions} directions"
            said += f", noise {self.noise:g}" if self.noise else ""
        return said or "mean"


def moments_of(texts: Texts, form: Form) -> list[Moment]:
    """The moments that the file of `texts` holds, one a layer."""
    by_text = texts.means() if form.granularity == "sample" else texts
    held = Representation()
    found: dict[str, Moment] = {}
    for layer, rows in enumerate(by_text.rows):
        mean = form.granularity == "task_mean"
        moment = MeanMoment(rows.shape[1]) if mean else held.new(form.kind, rows.shape[1])
        found[str(layer)] = moment.update(rows)
    if form.directions:
        found = published(found, form.directions, form.noise, None)
    # As a reader gets them: through what is written and read again.
    return [type(m).restore(*m.state()) for m in found.values()]


class View(NamedTuple):
    """A moment as an attacker sees it: `S ≈ V diag(values) Vᵀ + floor (I − V Vᵀ)` over n rows."""

    values: Tensor
    vectors: Tensor
    floor: float
    count: int


def view(moment: Moment) -> View:
    """The eigenvalues that stand out of rounding, and a floor for what the file leaves open."""
    rows = moment.factor
    matrix = moment.matrix if rows is None or len(rows) >= moment.dim else None
    if matrix is not None:
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, left = torch.linalg.eigh(rows @ rows.T)
        vectors = rows.T @ (left / values.clamp_min(1e-300).sqrt())
    stands = values > 1e-10 * values.max()
    energy = moment.trace / moment.dim
    floor = max(moment.slack or 0.0, 1e-9 * energy)
    return View(values[stands].float(), vectors[:, stands].float(), floor, moment.count)


def checked(model: nn.Module, tokenizer, texts: Sequence[str]) -> float:
    """How far moments made here lie from those of `collect_statistics`, relative: rounding."""
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    real = list(collect_statistics(model, [batch], ["query"]).moments.values())
    ours = moments_of(encode(model, tokenizer, texts), Form())
    return max(
        float((a.matrix - b.matrix).norm() / a.matrix.norm())
        for a, b in zip(real, ours, strict=True)
    )
