"""Core space: TIES on the small matrices the adapters become in a basis they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import SIGN_METHODS, elect_and_mean
from orthomerge.merging.parts.lowrank import column_basis, nonzero, zero_like
from orthomerge.merging.parts.options import check_choice, check_fraction, check_number
from orthomerge.merging.parts.sparsify import trim
from orthomerge.merging.registry import register


@register(
    name="core_space",
    title="Core space TIES",
    summary="Use TIES at the cost of the adapters' rank, in a basis they share on both sides.",
    paper="Panariello et al. 2025, Accurate and efficient low-rank model merging in core space",
    url="https://arxiv.org/abs/2509.17786",
    low_rank=True,
)
def core_space(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
) -> LoraFactors:
    """`λ U ties(M_1, ..., M_N) Vᵀ` with `M_i = Uᵀ ΔW_i V`, of size at most Σ r_i.

    U holds the left singular vectors of the stacked `[B_1 ... B_N]`, V the right ones of the
    stacked A_i; they span every update, so `ΔW_i = U M_i Vᵀ` exactly and only TIES (trim, elect,
    disjoint mean) changes anything. O((d_in + d_out) R² + N R² log R), R = Σ r_i.

    Raises:
        MergeError: an option value out of its range.

    Source: Panariello et al. 2025, arXiv 2509.17786.
    """
    check_fraction("density", density)
    check_choice("majority_sign_method", majority_sign_method, SIGN_METHODS)
    check_number("lambda_", lambda_)
    first = factors[0]
    present, kept_weights = nonzero(factors, weights)
    if not present:
        return zero_like(first)
    U = column_basis(torch.cat([f.B for f in present], dim=1))
    V = column_basis(torch.cat([f.A for f in present], dim=0).T)
    core = [f.scaling * (U.T @ f.B.double()) @ (f.A.double() @ V) for f in present]
    trimmed = torch.stack([trim(matrix, density) for matrix in core])
    merged = elect_and_mean(trimmed, trimmed.new_tensor(kept_weights), majority_sign_method)
    return LoraFactors(V.T.to(first.A), (U @ merged).to(first.B), lambda_)
