"""Frequent Directions: a sketch of a second moment that bounds what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import StatisticsError
from orthomerge.moments.full import SecondMoment
from orthomerge.moments.moment import Moment, mixed_granularity
from orthomerge.moments.rows import RowMoment

DEFAULT_SIZE = 64
_LARGEST = 2**14  # of a file: merging takes memory for twice as many rows


class SketchMoment(Moment):
    """At most `size` rows `R` with `RᵀR ≤ S` and little lost (Liberty 2013, arXiv 1206.0594).

    For every unit x and every k < size,
    `0 ≤ xᵀ(S − RᵀR)x ≤ slack ≤ (tr S − Σ_{i≤k} λ_i(S)) / (size − k)`
    (Ghashami et al. 2016, arXiv 1501.01711): `slack` is what was really taken off, the last term
    what it can be at most. Merging two sketches adds their slacks and keeps the bound, for the
    smaller of two sizes. A sample of rows bounds nothing, and no sketch that it went into. Memory
    O(2 size d_in), a row costs about `8 size d_in` multiply-adds.
    """

    kind: ClassVar[str] = "sketch"

    def __init__(self, dim: int, size: int = DEFAULT_SIZE) -> None:
        if size < 1:
            raise StatisticsError(f"a sketch keeps at least one direction, not {size}.")
        super().__init__(dim)
        self._size = size
        self._rows = torch.zeros(0, dim, dtype=torch.float64)
        self._filled = 0
        # What was taken off, over all rows; None once a sample went in, which bounds nothing.
        self._shrunk: float | None = 0.0

    @property
    def size(self) -> int:
        """Directions kept."""
        return self._size

    @property
    def exact(self) -> bool:
        """Whether nothing was taken off yet."""
        return self._shrunk == 0.0

    @property
    def slack(self) -> float | None:
        """The most energy of a unit direction that the sketch leaves out; None where unknown."""
        if self._shrunk is None:
            return None
        return self._shrunk / self._count if self._count else 0.0

    @property
    def factor(self) -> Float[Tensor, "k d_in"]:
        """Rows `R` with `RᵀR ≤ S`, at most `size`, float64."""
        self._require_rows()
        self._shrink()
        return self._rows[: self._filled] / self._count**0.5

    def _add_rows(self, rows: Tensor, draw: int | None) -> None:
        self._push(rows)
        self._count += rows.shape[0]

    def _push(self, rows: Tensor) -> None:
        capacity = 2 * self._size
        if self._rows.shape[0] < capacity or self._rows.device != rows.device:
            buffer = torch.zeros(capacity, self._dim, dtype=torch.float64, device=rows.device)
            buffer[: self._filled] = self._rows[: self._filled]
            self._rows = buffer
        start = 0
        while start < rows.shape[0]:
            take = min(capacity - self._filled, rows.shape[0] - start)
            self._rows[self._filled : self._filled + take] = rows[start : start + take]
            self._filled += take
            start += take
            if self._filled == capacity:
                self._shrink()

    def _shrink(self) -> None:
        """Turn to principal axes, take the energy of the first one too many off all of them."""
        if self._filled <= self._size:
            return
        rows = self._rows[: self._filled]
        values, vectors = linalg.eigh(rows @ rows.T)
        values = values.flip(0).clamp_min(0.0)
        lost = values[self._size]
        kept = values[: self._size]
        scale = ((kept - lost).clamp_min(0.0) / kept.clamp_min(1e-300)).sqrt()
        turned = vectors.flip(1)[:, : self._size].T @ rows
        self._rows[: self._size] = turned * scale[:, None]
        self._filled = int((scale > 0).sum())
        if self._shrunk is not None:
            self._shrunk += float(lost)

    def __add__(self, other: Moment) -> Moment:
        """The sketch over both sets of rows; a full moment stays full."""
        self._check_width(other)
        if isinstance(other, SecondMoment):
            return other + self
        if other.kind == "mean":
            raise mixed_granularity()
        total = SketchMoment(self._dim, max(self._size, getattr(other, "size", 0)))
        for part in (self, other):
            if part.count:
                factor = part.factor
                assert factor is not None
                total._push(factor * part.count**0.5)
            total._count += part.count
            if part.slack is None or total._shrunk is None:
                total._shrunk = None
            else:
                total._shrunk += part.slack * part.count
        return total

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The factor, what was taken off, the count."""
        factor = self.factor.contiguous()
        return {"factor": factor}, {
            "count": self._count,
            "size": self._size,
            "slack": self.slack,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> SketchMoment:
        """A sketch from its factor.

        Raises:
            StatisticsError: not a matrix of finite rows, longer than its size, or no row.
        """
        plain = RowMoment.restore(tensors, {**fields, "exact": True})
        factor, size = plain.factor, int(fields["size"])
        if size > max(_LARGEST, plain.dim):
            raise StatisticsError(
                f"a sketch of {size:,} rows is no sketch of inputs {plain.dim:,} wide: collect it "
                "again."
            )
        if factor.shape[0] > size:
            raise StatisticsError(
                f"a sketch of size {size} cannot hold {factor.shape[0]} rows: collect it again."
            )
        sketch = cls(plain.dim, size)
        sketch._rows = factor * plain.count**0.5
        sketch._filled = factor.shape[0]
        sketch._count = plain.count
        sketch._shrunk = None if plain.slack is None else plain.slack * plain.count
        return sketch
