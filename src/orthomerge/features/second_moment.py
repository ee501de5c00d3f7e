"""Streaming second moments of feature rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import StatisticsError


class SecondMoment:
    """`S = HᵀH / n` over rows seen in any number of pieces (DESIGN: second moment, not covariance).

    Sums are kept in float64 and rows are cast before they are multiplied, so the result does not
    depend on how the rows were split beyond float64 rounding. Memory O(d_in²), an update of n rows
    O(n d_in²).
    """

    def __init__(self, dim: int) -> None:
        self._sum = torch.zeros(dim, dim, dtype=torch.float64)
        self._count = 0

    @classmethod
    def from_matrix(cls, matrix: Float[Tensor, "d_in d_in"], count: int) -> SecondMoment:
        """A moment from its normalised matrix and the number of rows behind it."""
        moment = cls(matrix.shape[0])
        moment._sum = matrix.double() * count
        moment._count = count
        return moment

    @property
    def count(self) -> int:
        """Number of rows seen."""
        return self._count

    @property
    def dim(self) -> int:
        """Width of a row, d_in."""
        return self._sum.shape[0]

    @property
    def matrix(self) -> Float[Tensor, "d_in d_in"]:
        """`HᵀH / n`, float64.

        Raises:
            StatisticsError: no row was seen.
        """
        if not self._count:
            raise StatisticsError("no feature row was seen: the sample is empty or all padding.")
        return self._sum / self._count

    def update(self, rows: Float[Tensor, "n d_in"]) -> SecondMoment:
        """Add rows; returns self.

        Raises:
            StatisticsError: rows of another width, or rows with NaN or infinity.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise StatisticsError(
                f"feature rows {list(rows.shape)} do not fit a moment of width {self.dim}: "
                "pass rows [n, d_in] of one layer."
            )
        wide = rows.detach().double()
        product = wide.T @ wide
        if not bool(torch.isfinite(product).all()):
            raise StatisticsError(
                "the features hold NaN or infinity: run the model in float32 or bfloat16."
            )
        self._sum = self._sum.to(product.device)
        self._sum += product
        self._count += rows.shape[0]
        return self

    def __add__(self, other: SecondMoment) -> SecondMoment:
        """The moment over both sets of rows."""
        if other.dim != self.dim:
            raise StatisticsError(f"moments of width {self.dim} and {other.dim} do not add up.")
        total = SecondMoment(self.dim)
        total._sum = self._sum + other._sum
        total._count = self._count + other._count
        return total
