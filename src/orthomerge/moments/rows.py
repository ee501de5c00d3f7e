"""The row form: a factor `R` with `S = RᵀR`, for fewer rows than dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import StatisticsError
from orthomerge.moments.moment import Moment, slack_of, weighted_slack

DEFAULT_ROWS = 1024


class RowMoment(Moment):
    """A second moment as rows: exact up to `limit` rows, a uniform sample of `limit` beyond.

    The sample is drawn without replacement by random priorities (the `limit` smallest stay), so it
    does not depend on the order of the batches, only on their draws. Merging two never loses
    anything: factors are stacked, and folded to at most d_in rows by a QR where they grow longer.
    Memory O(limit d_in); an update copies.
    """

    kind: ClassVar[str] = "rows"

    def __init__(self, dim: int, limit: int = DEFAULT_ROWS) -> None:
        if limit < 1:
            raise StatisticsError(f"a row moment keeps at least one row, not {limit}.")
        super().__init__(dim)
        self._limit = limit
        # Settled rows are a factor of a normalised moment (`_count`, `_exact` and `_slack` are
        # theirs); sampled ones still compete for a place.
        self._settled = torch.zeros(0, dim, dtype=torch.float64)
        self._sample = torch.zeros(0, dim)
        self._priority = torch.zeros(0, dtype=torch.float64)
        self._seen = 0
        self._gram: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Float[Tensor, "n d_in"]) -> RowMoment:
        """The exact moment of rows `H`: `S = HᵀH / n`."""
        return cls(rows.shape[1], max(rows.shape[0], 1)).update(rows)

    @classmethod
    def from_factor(
        cls,
        factor: Float[Tensor, "k d_in"],
        count: int,
        *,
        exact: bool = True,
        slack: float | None = 0.0,
        gram: Float[Tensor, "k k"] | None = None,
    ) -> RowMoment:
        """A moment from a factor of its normalised matrix, `S = RᵀR`; `gram` is `R Rᵀ` if known."""
        moment = cls(factor.shape[1], DEFAULT_ROWS)
        moment._settled = factor.double()
        moment._count, moment._exact, moment._slack = count, exact, slack
        moment._gram = gram
        return moment

    @property
    def count(self) -> int:
        """Number of rows seen, kept or not."""
        return self._count + self._seen

    @property
    def kept(self) -> int:
        """Number of rows of the factor."""
        return self._settled.shape[0] + self._sample.shape[0]

    @property
    def exact(self) -> bool:
        """Whether no row was left out."""
        return self._exact and self._seen == self._sample.shape[0]

    @property
    def slack(self) -> float | None:
        """What merged sketches left out; None for a sample, which bounds nothing."""
        return self._slack if self._seen == self._sample.shape[0] else None

    @property
    def factor(self) -> Float[Tensor, "k d_in"]:
        """Rows `R` with `S = RᵀR`, float64."""
        self._require_rows()
        if not self._seen:
            return self._settled
        # Each row of the sample represents seen / kept of them.
        weight = self._seen / self._sample.shape[0] / self.count
        sample = self._sample.double() * weight**0.5
        if not self._count:
            return sample
        share = self._count / self.count
        return torch.cat([self._settled.to(sample.device) * share**0.5, sample])

    @property
    def gram(self) -> Float[Tensor, "k k"]:
        """`R Rᵀ`, computed once. O(k² d_in)."""
        if self._gram is None:
            rows = self.factor
            self._gram = rows @ rows.T
        return self._gram

    @property
    def trace(self) -> float:
        """`tr(S)`."""
        return float(self.factor.square().sum() if self._gram is None else self._gram.trace())

    def _add_rows(self, rows: Tensor, draw: int | None) -> None:
        """Beyond the limit a uniform sample stays, drawn by `draw`."""
        seed = self._seen if draw is None else draw
        generator = torch.Generator().manual_seed(seed)
        priority = torch.rand(rows.shape[0], generator=generator, dtype=torch.float64)
        self._seen += rows.shape[0]
        if self._priority.numel() == self._limit:
            # Rows that cannot enter are left where they are, uncopied.
            enters = priority < self._priority.max()
            priority, rows = priority[enters], rows[enters.to(rows.device)]
        self._enter(rows, priority)

    def add_zeros(self, count: int) -> RowMoment:
        """Count rows that are zero, of which none is kept; returns self."""
        self._gram = None
        if self._count:
            self._settled = self._settled * (self._count / (self._count + count)) ** 0.5
        return super().add_zeros(count)

    def _enter(self, rows: Tensor, priority: Tensor) -> None:
        self._gram = None
        have, limit = self._priority.numel(), self._limit
        both = torch.cat([self._priority, priority])
        stays = torch.ones(both.numel(), dtype=torch.bool)
        if both.numel() > limit:
            stays = torch.zeros_like(stays)
            stays[both.topk(limit, largest=False).indices] = True
        come = stays[have:].nonzero()[:, 0]
        rows = rows.index_select(0, come.to(rows.device))
        # Rows of two types meet in the wider one: the cast must not round what was kept.
        kept = self._sample.to(rows.device, torch.promote_types(self._sample.dtype, rows.dtype))
        # Those that come take the places of those that go; what is left over goes to the end.
        places = (~stays[:have]).nonzero()[:, 0]
        kept.index_copy_(0, places.to(kept.device), rows[: len(places)].to(kept.dtype))
        if not have:
            kept = rows.clone()
        elif len(come) > len(places):
            kept = torch.cat([kept, rows[len(places) :].to(kept.dtype)])
        order = self._priority.clone()
        order[places] = priority[come[: len(places)]]
        self._sample = kept
        self._priority = torch.cat([order, priority[come[len(places) :]]])

    def pool(self, other: RowMoment) -> RowMoment:
        """One sample of two parts of one collection: the rows that one pass would have kept.

        Unlike a sum, which never drops a row, it needs both parts to be drawn with the numbers of
        one pass (`draw`). Returns self.
        """
        self._enter(other._sample.to(self._sample.device), other._priority)
        self._seen += other._seen
        self._count += other._count
        return self

    def sample_on(self, device: torch.device | str) -> RowMoment:
        """The same rows and priorities on `device`, still open to more rows and to `pool`."""
        moved = RowMoment(self._dim, self._limit)
        moved._sample = self._sample.to(device, copy=True)  # `update` writes into its sample
        moved._priority = self._priority
        moved._seen, moved._count = self._seen, self._count
        return moved

    def __add__(self, other: Moment) -> Moment:
        """The moment over both sets of rows: factors stacked; with a full or a sketch, its kind."""
        self._check_width(other)
        if not isinstance(other, RowMoment):
            return other + self
        count = self.count + other.count
        parts = [m.factor * (m.count / count) ** 0.5 for m in (self, other) if m.count]
        parts = [part.to(parts[0].device) for part in parts]
        total = RowMoment.from_factor(
            fold(torch.cat(parts)) if parts else self._settled,
            count,
            exact=self.exact and other.exact,
            slack=weighted_slack([self, other], [m.count / max(count, 1) for m in (self, other)]),
        )
        total._limit = max(self._limit, other._limit)
        return total

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The factor as an upper trapezoid: what `S` says of the rows and no more.

        It is the same for all rows of one `S`; only of a single row `S` says all but the sign.
        """
        fields = {
            "count": self.count,
            "exact": self.exact,
            "slack": self.slack,
            "limit": self._limit,
        }
        return {"factor": triangular(self.factor)}, fields

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> RowMoment:
        """A moment from its factor.

        Raises:
            StatisticsError: not a matrix of finite rows, or no row.
        """
        factor, count = tensors["factor"], int(fields["count"])
        limit = int(fields.get("limit", DEFAULT_ROWS))
        if limit < 1:
            raise StatisticsError(f"a row moment keeps at least one row, not {limit}.")
        if factor.ndim != 2 or count < 1 or not bool(factor.isfinite().all()):
            raise StatisticsError(
                f"a factor {list(factor.shape)} of {count} rows is not finite or not a matrix: "
                "collect it again."
            )
        moment = cls.from_factor(factor, count, exact=bool(fields["exact"]), slack=slack_of(fields))
        moment._limit = limit
        return moment


def triangular(rows: Float[Tensor, "k d_in"]) -> Float[Tensor, "m d_in"]:
    """The upper trapezoid `U` with `UᵀU = RᵀR`, m = min(k, d_in): rotated rows, no row as seen.

    Householder QR, O(k² d_in); signs fixed so that equal moments give equal factors.
    """
    upper = linalg.qr(rows, mode="r").R
    signs = torch.sign(torch.diagonal(upper))
    signs[signs == 0] = 1.0
    return upper * signs[:, None]


def fold(rows: Float[Tensor, "k d_in"]) -> Float[Tensor, "m d_in"]:
    """At most d_in rows with the same `RᵀR`."""
    return triangular(rows) if rows.shape[0] > rows.shape[1] else rows
