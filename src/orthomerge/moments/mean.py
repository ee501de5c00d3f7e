"""One row for a whole task: the mean over all real tokens, as the published code takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import StatisticsError
from orthomerge.moments.moment import Moment, mixed_granularity


class MeanMoment(Moment):
    """`S = m mᵀ` with `m` the mean of all rows: a moment of one row. Sums add up, and take apart.

    Memory O(d_in), an update O(n d_in).
    """

    kind: ClassVar[str] = "mean"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._tokens = 0

    @property
    def count(self) -> int:
        """1: the mean is the only row."""
        return min(self._tokens, 1)

    @property
    def tokens(self) -> int:
        """Number of rows averaged."""
        return self._tokens

    @property
    def factor(self) -> Float[Tensor, "1 d_in"]:
        """The mean as a row."""
        self._require_rows()
        return (self._sum / self._tokens)[None, :]

    def _add_rows(self, rows: Tensor, draw: int | None) -> None:
        self._sum = self._sum.to(rows.device) + rows.double().sum(dim=0)
        self._tokens += rows.shape[0]

    def add_zeros(self, count: int) -> MeanMoment:
        """Count rows that are zero; returns self."""
        self._tokens += count
        return self

    def __add__(self, other: Moment) -> MeanMoment:
        """The mean over both sets of rows."""
        return self._with(other, 1)

    def __sub__(self, other: Moment) -> MeanMoment:
        """The mean without rows that are in it."""
        return self._with(other, -1)

    def _with(self, other: Moment, sign: int) -> MeanMoment:
        self._check_width(other)
        if not isinstance(other, MeanMoment):
            raise mixed_granularity()
        total = MeanMoment(self.dim)
        total._sum = self._sum + sign * other._sum.to(self._sum.device)
        total._tokens = self._tokens + sign * other._tokens
        if total._tokens < 1:
            raise StatisticsError("nothing would be left of the mean: subtract a part of it.")
        return total

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The mean and the number of rows behind it."""
        return {"mean": self.factor[0].contiguous()}, {"tokens": self._tokens}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> MeanMoment:
        """A moment from its mean.

        Raises:
            StatisticsError: not a finite vector, or no row.
        """
        mean, tokens = tensors["mean"], int(fields["tokens"])
        if mean.ndim != 1 or tokens < 1 or not bool(mean.isfinite().all()):
            raise StatisticsError(
                f"a mean {list(mean.shape)} of {tokens} rows is not a finite vector: collect it "
                "again."
            )
        moment = cls(len(mean))
        moment._sum = mean.double() * tokens
        moment._tokens = tokens
        return moment
