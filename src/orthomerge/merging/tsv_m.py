"""TSV-M: the adapters' singular vectors, decorrelated before they are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.lowrank import nonzero, polar, thin_svd, zero_like
from orthomerge.merging.parts.options import check_number
from orthomerge.merging.registry import register


@register(
    name="tsv_m",
    title="TSV-Merge",
    summary="Use when the adapters' singular directions overlap: it makes them orthogonal first.",
    paper="Gargiulo et al. 2025, Task Singular Vectors",
    url="https://arxiv.org/abs/2412.00081",
    low_rank=True,
    default_weight="1/√N",
)
def tsv_m(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, lambda_: float = 1.0
) -> LoraFactors:
    """`λ U⊥ diag(w_i σ_i) V⊥ᵀ`, U⊥ and V⊥ the nearest orthonormal to the stacked U_i and V_i.

    `ΔW_i = U_i diag(σ_i) V_iᵀ` keeps its first k = min(r_i, min(d_out, d_in) / N) directions, so
    adapters with Σ r_i ≤ min(d_out, d_in) of equal rank lose none. Adapters already orthogonal on
    both sides are summed exactly. O((d_in + d_out) R² + R³), R = Σ r_i.

    Raises:
        MergeError: `lambda_` is not a finite number.

    Source: Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1.
    """
    check_number("lambda_", lambda_)
    present, kept = nonzero(factors, weights)
    if not present:
        return zero_like(factors[0])
    like = factors[0]
    share = max(min(like.shape) // len(present), 1)
    parts = [thin_svd(f) for f in present]
    U = polar(torch.cat([u[:, :share] for u, _, _ in parts], dim=1), like.A.dtype)
    V = polar(torch.cat([vh[:share].T for _, _, vh in parts], dim=1), like.A.dtype)
    s = torch.cat([w * s[:share] for (_, s, _), w in zip(parts, kept, strict=True)])
    return LoraFactors(V.T.to(like.A), (U * s).to(like.B), lambda_)
