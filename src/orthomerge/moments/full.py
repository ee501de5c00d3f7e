"""The full second moment: exact, d_in² numbers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import StatisticsError
from orthomerge.moments.moment import Moment, mixed_granularity, slack_of, weighted_slack

# Columns a symmetric product takes at a time: below it the waste on the diagonal blocks grows,
# above it the calls are too small (benchmarks/statistics.py, --blocks).
_BLOCK = 96
# Numbers cast to float64 at a time, into memory that is used again: fresh pages would cost as much
# as a third of the product.
_NUMBERS = 1 << 20
# On other devices, where larger products are faster and memory alone bounds them.
_NUMBERS_ELSEWHERE = 1 << 24
_scratch = threading.local()


class SecondMoment(Moment):
    """`S = HᵀH / n` kept whole (DESIGN: a second moment, not a covariance).

    Sums are kept in float64 and rows are cast before they are multiplied, so the result does not
    depend on how the rows were split beyond float64 rounding. Only the upper triangle is computed:
    an update of n rows costs about `0.6 n d_in²` multiply-adds, memory is `8 d_in²` bytes.
    """

    kind: ClassVar[str] = "full"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        # The upper triangle in blocks; what is below the diagonal blocks is never written.
        self._sum: Tensor | None = torch.zeros(dim, dim, dtype=torch.float64)
        # The normalised matrix once it was asked for; the sum can be made of it again.
        self._matrix: Tensor | None = None
        self._pairs: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_matrix(
        cls,
        matrix: Float[Tensor, "d_in d_in"],
        count: int,
        *,
        exact: bool = True,
        slack: float | None = 0.0,
    ) -> SecondMoment:
        """A moment from its normalised, symmetric matrix and the number of rows behind it."""
        moment = cls(0)
        moment._sum, moment._matrix = None, matrix.double()
        moment._count, moment._dim = count, matrix.shape[0]
        moment._exact, moment._slack = exact, slack
        return moment

    @property
    def matrix(self) -> Float[Tensor, "d_in d_in"]:
        """`HᵀH / n`, symmetric, float64; computed once, not to be written to. O(d_in²)."""
        self._require_rows()
        if self._matrix is None:
            assert self._sum is not None
            upper = torch.triu(self._sum).div_(self._count)
            self._matrix = upper + torch.triu(upper, 1).T
        return self._matrix

    def eigh(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
        """The eigenpairs, decomposed once however many solvers ask. O(d_in³)."""
        if self._pairs is None:
            self._pairs = super().eigh()
        return self._pairs

    @property
    def trace(self) -> float:
        """`tr(S)`."""
        return float(torch.diagonal(self.matrix).sum())

    @classmethod
    def from_sums(cls, sums: Float[Tensor, "d_in d_in"], count: int) -> SecondMoment:
        """A moment from `HᵀH`, of which only the upper triangle is read."""
        moment = cls(0)
        moment._sum, moment._count, moment._dim = sums, count, sums.shape[0]
        return moment

    def sums(self, device: torch.device) -> tuple[Float[Tensor, "d_in d_in"], Tensor]:
        """`HᵀH` (valid in its upper triangle) and the count, copied to `device`, to be reduced."""
        return self._sums().to(device, copy=True), torch.tensor([self._count], device=device)

    def _sums(self) -> Tensor:
        """`HᵀH`, valid in its upper triangle."""
        if self._sum is None:
            assert self._matrix is not None
            self._sum = self._matrix * self._count
        return self._sum

    def apply(self, columns: Float[Tensor, "d_in m"]) -> Float[Tensor, "d_in m"]:
        """`S X`. O(d_in² m)."""
        # S is symmetric, and a short fat product reads it faster than a tall thin one.
        return (columns.double().T.contiguous() @ self.matrix).T

    def _add_rows(self, rows: Tensor, draw: int | None) -> None:
        if self._slack:
            self._slack *= self._count / (self._count + rows.shape[0])
        total = self._sum = self._sums().to(rows.device)
        self._matrix = self._pairs = None
        block = _NUMBERS if rows.device.type == "cpu" else _NUMBERS_ELSEWHERE
        size = max(block // max(self._dim, 1), 64)
        for part in cast(Sequence[Tensor], rows.split(size)):
            _add_products(total, _double(part))
        self._count += rows.shape[0]

    def add_zeros(self, count: int) -> SecondMoment:
        """Count rows that are zero; returns self."""
        if self._slack and count:
            self._slack *= self._count / (self._count + count)
        self._sum, self._matrix, self._pairs = self._sums(), None, None
        return super().add_zeros(count)

    def __add__(self, other: Moment) -> SecondMoment:
        """The moment over both sets of rows; a factored one is made dense."""
        self._check_width(other)
        if other.kind == "mean":
            raise mixed_granularity()
        sums, count = self._sums(), self._count + other.count
        if isinstance(other, SecondMoment):
            sums = sums + other._sums().to(sums.device)
        elif other.count:
            sums = sums + (other.matrix * other.count).to(sums.device)
        total = SecondMoment.from_sums(sums, count)
        shares = [m.count / max(count, 1) for m in (self, other)]
        total._exact = self.exact and other.exact
        total._slack = weighted_slack([self, other], shares)
        return total

    def __sub__(self, other: Moment) -> SecondMoment:
        """The moment without rows that are in it: exact for two full moments.

        Raises:
            StatisticsError: another kind, another width, or more rows than there are.
        """
        self._check_width(other)
        if not isinstance(other, SecondMoment):
            return super().__sub__(other)  # pyright: ignore[reportReturnType]  (raises)
        if not (self._exact and other._exact):
            raise StatisticsError(
                "a full moment that sketches or samples went into cannot be taken apart exactly: "
                "combine the other tasks' moments instead."
            )
        if other._count >= self._count:
            raise StatisticsError(
                f"{other._count} rows cannot be taken out of {self._count}: subtract a part."
            )
        sums = self._sums()
        left = sums - other._sums().to(sums.device)
        # Rounding goes below zero where what is left has no energy; no moment does.
        torch.diagonal(left).clamp_(min=0.0)
        return SecondMoment.from_sums(left, self._count - other._count)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The normalised matrix, the count, what sketches left out."""
        fields = {"count": self._count, "exact": self._exact, "slack": self._slack}
        return {"matrix": self.matrix}, fields

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> SecondMoment:
        """A moment from its matrix and count.

        Raises:
            StatisticsError: not square, not finite, a negative diagonal, no row.
        """
        matrix, count = tensors["matrix"], int(fields["count"])
        square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
        if not square or count < 1:
            raise StatisticsError(
                f"a full moment is square and of at least one row, not {list(matrix.shape)} of "
                f"{count} rows: collect it again."
            )
        slack = slack_of(fields)
        negative = bool((torch.diagonal(matrix) < 0).any())
        if not bool(torch.isfinite(matrix).all()) or negative:
            raise StatisticsError(
                "a full moment holds NaN, infinity or negative energy: collect it again."
            )
        return cls.from_matrix(matrix, count, exact=bool(fields.get("exact", True)), slack=slack)


def _double(rows: Tensor) -> Tensor:
    """Rows in float64, on the CPU in a buffer that the next call overwrites."""
    if rows.device.type != "cpu" or rows.dtype == torch.float64:
        return rows.double()
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < rows.numel():
        held = _scratch.held = torch.empty(max(rows.numel(), _NUMBERS), dtype=torch.float64)
    return held[: rows.numel()].view(rows.shape).copy_(rows)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """`total += HᵀH` in the upper triangle."""
    if rows.device.type != "cpu":
        total.addmm_(rows.T, rows)
        return
    for start in range(0, rows.shape[1], _BLOCK):
        block = rows[:, start : start + _BLOCK]
        total[start : start + _BLOCK, start:].addmm_(block.T, rows[:, start:])
