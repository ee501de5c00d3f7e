"""The full second moment: exact, d_in² numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import StatisticsError
from orthomerge.moments.moment import Moment, refuse_not_finite

# Columns a symmetric product takes at a time: below it the waste on the diagonal blocks grows,
# above it the calls are too small (benchmarks/statistics.py, --blocks).
_BLOCK = 96
# Rows cast to float64 at a time, so that a long batch stays in the cache.
_ROWS = 2048


class SecondMoment(Moment):
    """`S = HᵀH / n` kept whole (DESIGN: a second moment, not a covariance).

    Sums are kept in float64 and rows are cast before they are multiplied, so the result does not
    depend on how the rows were split beyond float64 rounding. Only the upper triangle is computed:
    an update of n rows costs about `0.6 n d_in²` multiply-adds, memory is `8 d_in²` bytes.
    """

    kind: ClassVar[str] = "full"

    def __init__(self, dim: int) -> None:
        # The upper triangle in blocks; what lies below the diagonal blocks is never written.
        self._sum: Tensor | None = torch.zeros(dim, dim, dtype=torch.float64)
        # The normalised matrix once it was asked for; the sum can be made of it again.
        self._matrix: Tensor | None = None
        self._count = 0
        self._dim = dim

    @classmethod
    def from_matrix(cls, matrix: Float[Tensor, "d_in d_in"], count: int) -> SecondMoment:
        """A moment from its normalised, symmetric matrix and the number of rows behind it."""
        moment = cls.__new__(cls)
        moment._sum, moment._matrix = None, matrix.double()
        moment._count, moment._dim = count, matrix.shape[0]
        return moment

    @property
    def count(self) -> int:
        """Number of rows seen."""
        return self._count

    @property
    def dim(self) -> int:
        """Width of a row, d_in."""
        return self._dim

    @property
    def matrix(self) -> Float[Tensor, "d_in d_in"]:
        """`HᵀH / n`, symmetric, float64; computed once, not to be written to. O(d_in²)."""
        self._require_rows()
        if self._matrix is None:
            assert self._sum is not None
            upper = torch.triu(self._sum).div_(self._count)
            self._matrix = upper + torch.triu(upper, 1).T
        return self._matrix

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
        return self.matrix @ columns.double()

    def update(self, rows: Float[Tensor, "n d_in"], draw: int | None = None) -> SecondMoment:
        """Add rows; returns self. About 0.6 n d_in² multiply-adds."""
        self._check_rows(rows)
        rows = rows.detach()
        total = self._sum = self._sums().to(rows.device)
        self._matrix = None
        for piece in rows.split(_ROWS):
            _add_products(total, piece.double())
        # A row with NaN or infinity reaches the diagonal, whatever its other entries are.
        if not bool(torch.isfinite(torch.diagonal(total)).all()):
            refuse_not_finite(rows)
        self._count += rows.shape[0]
        return self

    def __add__(self, other: Moment) -> SecondMoment:
        """The moment over both sets of rows; a factored one is made dense."""
        self._check_width(other)
        sums = self._sums()
        theirs = other._sums() if isinstance(other, SecondMoment) else other.matrix * other.count
        return SecondMoment.from_sums(sums + theirs.to(sums.device), self._count + other.count)

    def __sub__(self, other: Moment) -> SecondMoment:
        """The moment without rows that are in it: exact for two full moments.

        Raises:
            StatisticsError: another kind, another width, or more rows than there are.
        """
        self._check_width(other)
        if not isinstance(other, SecondMoment):
            return super().__sub__(other)  # pyright: ignore[reportReturnType]  (raises)
        if other._count >= self._count:
            raise StatisticsError(
                f"{other._count} rows cannot be taken out of {self._count}: subtract a part."
            )
        sums = self._sums()
        return SecondMoment.from_sums(
            sums - other._sums().to(sums.device), self._count - other._count
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The normalised matrix and the count."""
        return {"matrix": self.matrix}, {"count": self._count}

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
        if not bool(torch.isfinite(matrix).all()) or bool((torch.diagonal(matrix) < 0).any()):
            raise StatisticsError(
                "a full moment holds NaN, infinity or negative energy: collect it again."
            )
        return cls.from_matrix(matrix, count)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """`total += HᵀH` in the upper triangle."""
    if rows.device.type != "cpu":
        total.addmm_(rows.T, rows)
        return
    for start in range(0, rows.shape[1], _BLOCK):
        block = rows[:, start : start + _BLOCK]
        total[start : start + _BLOCK, start:].addmm_(block.T, rows[:, start:])
