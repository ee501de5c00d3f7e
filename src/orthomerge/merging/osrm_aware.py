"""OSRM-aware: the update of a given rank that least disturbs every task's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge import linalg
from orthomerge.factors import LoraFactors, energy
from orthomerge.merging.parts.least_squares import least_squares
from orthomerge.merging.parts.metric import Metric
from orthomerge.merging.parts.options import check_bool, check_positive, check_rank
from orthomerge.merging.registry import Truncated, register
from orthomerge.moments import Moment


@register(
    name="osrm_aware",
    title="OSRM-aware",
    summary="Use with adapters and statistics of one project: it least disturbs their outputs.",
    paper="ours: least squares on the statistics of OSRM (Zhang & Zhou 2025)",
    url="https://arxiv.org/abs/2505.22934",
    low_rank=True,
)
def osrm_aware(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    moments: Sequence[Moment],
    balance: bool = True,
    ridge: float = 1e-3,
    rank: int | None = None,
) -> LoraFactors | Truncated:
    """`min_ΔW Σ_t c_t ‖(ΔW - w_t ΔW_t) H_tᵀ‖²` over ΔW of rank at most `rank`, in closed form.

    With `balance`, `c_t = 1 / ‖ΔW_t H_tᵀ‖²`, so that every task counts by the relative change of
    its own outputs and a task of large features or a large update does not drown the others;
    without, c_t = 1 (then it is RegMean with α = 1, at full rank). Without a rank bound the
    minimiser `(Σ c_t w_t ΔW_t S_t) (Σ c_t S_t)⁻¹` has rank Σ r_t; under one it is that, projected
    to its top left singular directions in the metric `M = Σ c_t S_t` (reduced rank regression).
    `ridge`, in units of S_t's mean diagonal, decides what happens where no task has inputs: there
    the updates are averaged. O((d_out + R) R² + R d_in²) and one solve with M.

    Raises:
        MergeError: an option value out of its range.

    Source: ours; S_t as in Zhang & Zhou 2025, arXiv 2505.22934; reduced rank regression, Izenman
    1975, doi 10.1016/0047-259X(75)90042-1.
    """
    check_bool("balance", balance)
    check_positive("ridge", ridge)
    check_rank("rank", rank)
    shares = [
        _share(f, moment) if balance else 1.0 for f, moment in zip(factors, moments, strict=True)
    ]
    best, metric = least_squares(factors, weights, moments, shares, alpha=1.0, ridge=ridge)
    if rank is None or rank >= best.rank:
        return best
    return _cut(best, metric, rank)


def _share(factors: LoraFactors, moment: Moment) -> float:
    """One over the energy of the task's own output shift; 1 over its features' for no update."""
    own = energy(factors, moment)
    return 1.0 / own if own > 0 else 1.0 / max(moment.trace, torch.finfo(torch.float64).tiny)


def _cut(best: LoraFactors, metric: Metric, rank: int) -> Truncated:
    """The closest of a rank in the metric: the projection to the top left singular directions."""
    Q, R = linalg.qr(best.B.double())
    A = best.A.double()
    gram = R @ (metric.apply(A) @ A.T) @ R.T
    values, U = linalg.eigh((gram + gram.T) / 2)
    values, U = values.flip(0).clamp(min=0), U.flip(1)
    top = U[:, :rank]
    total = float(values.sum())
    lost = float(values[rank:].sum()) / total if total else 0.0
    update = LoraFactors((top.T @ R @ A).to(best.A), (Q @ top).to(best.B), best.scaling)
    return Truncated(update, lost**0.5)
