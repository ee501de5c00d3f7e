"""The update closest to several others, each judged on the inputs of its own task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.metric import Metric
from orthomerge.moments import Moment, SecondMoment


def least_squares(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    moments: Sequence[Moment],
    shares: Sequence[float],
    *,
    alpha: float,
    ridge: float,
) -> tuple[LoraFactors, Metric]:
    """The minimiser of `Σ c_i ‖ΔW - w_i ΔW_i‖²_{M_i}`, in factors of rank Σ r_i, and `Σ c_i M_i`.

    `‖X‖²_M = tr(X M Xᵀ)` and `M_i = α S_i + (1-α) diag(S_i) + ridge · mean(diag(S_i)) I`. The
    minimiser is `(Σ c_i w_i ΔW_i M_i) (Σ c_i M_i)⁻¹`, so the B_i stay and A_i becomes
    `c_i A_i M_i (Σ c_i M_i)⁻¹`. Where no moment has energy the updates are averaged.
    """
    if not any(moment.trace for moment in moments):  # as of an expert that no token reached
        eye = torch.eye(factors[0].A.shape[1], dtype=torch.float64)
        moments, shares = [SecondMoment.from_matrix(eye, 1)] * len(moments), [1.0] * len(moments)
    whole = Metric(moments, shares, alpha=alpha, ridge=ridge)
    A: list[torch.Tensor] = []
    for f, moment, share in zip(factors, moments, shares, strict=True):
        own = Metric([moment], [share], alpha=alpha, ridge=ridge)
        A.append(own.apply(f.A.double()))
    B = [(w * f.scaling) * f.B for f, w in zip(factors, weights, strict=True)]
    solved = whole.solve(torch.cat(A))
    return LoraFactors(solved.to(factors[0].A), torch.cat(B, dim=1), 1.0), whole
