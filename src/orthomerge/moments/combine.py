"""Moments of several tasks taken together: weighted means, and each task left out in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.errors import StatisticsError
from orthomerge.moments.full import SecondMoment
from orthomerge.moments.moment import Moment
from orthomerge.moments.rows import RowMoment, weighted_slack


def combine(moments: Sequence[Moment], weights: Sequence[float] | None = None) -> Moment:
    """`Σ_u w_u S_u`, the weights made to sum to one (equal by default), in the cheapest exact form.

    Factors are stacked while they have fewer rows than dimensions, else the matrices are summed.
    O(Σ k_u d_in) or O(T d_in²).

    Raises:
        StatisticsError: no moments, different widths, or weights that are negative, all zero or
            not one a moment.
    """
    shares = _shares(moments, weights)
    factors = _factors(moments)
    count = sum(m.count for m in moments)
    if factors is None:
        total = torch.zeros_like(moments[0].matrix)
        for moment, share in zip(moments, shares, strict=True):
            total += share * moment.matrix.to(total.device)
        return SecondMoment.from_matrix(total, count)
    rows = torch.cat([f * share**0.5 for f, share in zip(factors, shares, strict=True)])
    return _row_moment(rows, moments, shares, count)


def leave_one_out(
    moments: Sequence[Moment], weights: Sequence[float] | None = None
) -> list[Moment]:
    """For every task the moment of all the others, `S_other = Σ_{u≠t} w_u S_u / Σ_{u≠t} w_u`.

    What the tasks share is computed once: the sum of the matrices, or the Gram matrix of all rows,
    of which each task needs a part. O(T d_in²), or O((Σ k_u)² d_in) once and copies.

    Raises:
        StatisticsError: fewer than two moments, or what `combine` refuses.
    """
    if len(moments) < 2:
        raise StatisticsError("leaving one out needs at least two tasks.")
    shares = _shares(moments, weights)
    if max(shares) >= 1.0:
        raise StatisticsError("one task has all the weight, so the others have none.")
    factors = _factors(moments)
    counts = [m.count for m in moments]
    if factors is None:
        scaled = [s * m.matrix for s, m in zip(shares, moments, strict=True)]
        total = torch.stack(scaled).sum(dim=0) if len(scaled) < 3 else _sum(scaled)
        return [
            SecondMoment.from_matrix((total - mine) / (1.0 - share), sum(counts) - count)
            for mine, share, count in zip(scaled, shares, counts, strict=True)
        ]
    rows = torch.cat([f * share**0.5 for f, share in zip(factors, shares, strict=True)])
    gram = rows @ rows.T
    owner = torch.repeat_interleave(
        torch.arange(len(factors)), torch.tensor([f.shape[0] for f in factors])
    ).to(rows.device)
    found: list[Moment] = []
    for t, share in enumerate(shares):
        keep = (owner != t).nonzero()[:, 0]
        rest = [m for u, m in enumerate(moments) if u != t]
        left = [s / (1.0 - share) for u, s in enumerate(shares) if u != t]
        found.append(
            _row_moment(
                rows[keep] / (1.0 - share) ** 0.5,
                rest,
                left,
                sum(counts) - counts[t],
                gram=gram[keep][:, keep] / (1.0 - share),
            )
        )
    return found


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(matrices[0])
    for matrix in matrices:
        total += matrix
    return total


def _row_moment(
    rows: Tensor,
    moments: Sequence[Moment],
    shares: Sequence[float],
    count: int,
    gram: Tensor | None = None,
) -> RowMoment:
    return RowMoment.from_factor(
        rows,
        count,
        exact=all(m.exact for m in moments),
        slack=weighted_slack(moments, shares),
        gram=gram,
    )


def _shares(moments: Sequence[Moment], weights: Sequence[float] | None) -> list[float]:
    if not moments:
        raise StatisticsError("there is no moment to combine: name at least one task.")
    widths = {m.dim for m in moments}
    if len(widths) > 1:
        raise StatisticsError(
            f"moments of widths {sorted(widths)} cannot be combined: they come from different "
            "layers or models."
        )
    values = [1.0] * len(moments) if weights is None else [float(w) for w in weights]
    if len(values) != len(moments):
        raise StatisticsError(
            f"{len(values)} weights for {len(moments)} other tasks: give one a task."
        )
    total = sum(values)
    if not total > 0 or min(values) < 0 or total == float("inf"):
        raise StatisticsError(f"weights {values} must be finite, not negative and not all zero.")
    return [v / total for v in values]


def _factors(moments: Sequence[Moment]) -> list[Tensor] | None:
    """Every moment's factor, where together they are shorter than wide; else None."""
    factors = [m.factor for m in moments]
    held = [f for f in factors if f is not None]
    if len(held) < len(factors) or sum(f.shape[0] for f in held) >= moments[0].dim:
        return None
    return held
