"""Moments of several tasks taken together: weighted means, and each task left out in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthomerge.errors import StatisticsError
from orthomerge.moments.full import SecondMoment
from orthomerge.moments.moment import Moment, weighted_slack
from orthomerge.moments.rows import RowMoment

# A task with more than this many times the others' energy is not subtracted from the sum of all.
_LOUD = 100.0


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
        return SecondMoment.from_matrix(total, count, **_carried(moments, shares))
    rows = torch.cat([f * share**0.5 for f, share in zip(factors, shares, strict=True)])
    return RowMoment.from_factor(rows, count, **_carried(moments, shares))


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
    rests = [sum(s for u, s in enumerate(shares) if u != t) for t in range(len(shares))]
    if min(rests) <= 0:
        raise StatisticsError("one task has all the weight, so the others have none.")
    factors = _factors(moments)
    counts = [m.count for m in moments]
    left = [sum(counts) - count for count in counts]
    carried = [
        _carried(
            [m for u, m in enumerate(moments) if u != t],
            [s / rest for u, s in enumerate(shares) if u != t],
        )
        for t, rest in enumerate(rests)
    ]
    if factors is None:
        sums = _sums_of_others([m.matrix for m in moments], shares)
        return [
            SecondMoment.from_matrix(total.div_(rest), count, **about)
            for total, rest, count, about in zip(sums, rests, left, carried, strict=True)
        ]
    # All rows twice, one after the other, so that the others of each task are one block that
    # need not be copied; where all tasks weigh the same their scale is right already.
    common = rests[0]
    rows = torch.cat([f * (s / common) ** 0.5 for f, s in zip(factors, shares, strict=True)] * 2)
    half = rows.shape[0] // 2
    gram = rows[:half] @ rows[:half].T
    found: list[Moment] = []
    end = 0
    for t, rest in enumerate(rests):
        start, end = end, end + factors[t].shape[0]
        others = rows[end : start + half]
        kept = torch.arange(end, start + half, device=rows.device) % half
        small = gram[kept][:, kept]
        if rest != common:
            others, small = others * (common / rest) ** 0.5, small * (common / rest)
        found.append(RowMoment.from_factor(others, left[t], gram=small, **carried[t]))
    return found


def _sums_of_others(matrices: Sequence[Tensor], shares: Sequence[float]) -> list[Tensor]:
    """`Σ_{u≠t} w_u S_u` for every t: the whole sum without one, or added up without it.

    Subtracting S_t leaves the rounding error of the whole sum behind, which would hide low-energy
    tasks next to a dominant one; there the others are added up.
    """
    total = torch.zeros_like(matrices[0])
    for matrix, share in zip(matrices, shares, strict=True):
        total.add_(matrix.to(total.device), alpha=share)
    energy = float(total.trace())
    found: list[Tensor] = []
    for t, (matrix, share) in enumerate(zip(matrices, shares, strict=True)):
        rest = torch.sub(total, matrix.to(total.device), alpha=share)
        if not float(rest.trace()) * _LOUD > energy:
            rest.zero_()
            for u, (other, weight) in enumerate(zip(matrices, shares, strict=True)):
                if u != t:
                    rest.add_(other.to(rest.device), alpha=weight)
        found.append(rest)
    return found


def _carried(moments: Sequence[Moment], shares: Sequence[float]) -> dict[str, Any]:
    """What a combination says of itself: whether it is exact, and what was left out."""
    return {
        "exact": all(m.exact for m in moments),
        "slack": weighted_slack(moments, shares),
    }


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
            f"{len(values)} weights for {len(moments)} other tasks: give one per task."
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
