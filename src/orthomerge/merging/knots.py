"""KnOTS: one shared basis of outputs by a joint SVD, then any merge of what each does with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import elect_and_mean, weighted_total
from orthomerge.merging.parts.elementwise import elementwise
from orthomerge.merging.parts.options import check_fraction
from orthomerge.merging.parts.sparsify import random_drop, trim
from orthomerge.merging.registry import Update, register

_PAPER = "Stoica et al. 2025, Model merging with SVD to tie the KnOTS"
_URL = "https://arxiv.org/abs/2410.19735"


@register(
    name="knots_ta",
    title="KnOTS task arithmetic",
    summary="Equal to task arithmetic: the shared basis changes nothing for a sum.",
    paper=_PAPER,
    url=_URL,
    low_rank=True,
)
def knots_ta(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, lambda_: float = 1.0
) -> Update:
    """`λ U Σ_i w_i (Σ V_iᵀ)`, where `[ΔW_1 ... ΔW_N] = U Σ [V_1ᵀ ... V_Nᵀ]`: the exact sum.

    Of the rank of the sum's output space, which may be less than Σ r_i. O((d_out + N d_in) R²).

    Raises:
        MergeError: `lambda_` is not a finite number.

    Source: Stoica et al. 2025, arXiv 2410.19735.
    """
    return elementwise(factors, weights, consensus=weighted_total, space="knots", lambda_=lambda_)


@register(
    name="knots_ties",
    title="KnOTS TIES",
    summary="Use TIES in a basis the adapters share rather than on raw entries.",
    paper=_PAPER,
    url=_URL,
    low_rank=True,
)
def knots_ties(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
) -> Update:
    """`λ U ties(Σ V_1ᵀ, ..., Σ V_Nᵀ)` where `[ΔW_1 ... ΔW_N] = U Σ [V_1ᵀ ... V_Nᵀ]`.

    TIES (trim, elect, disjoint mean, here per layer) works on the `[k, d_in]` matrices of the
    shared basis, k ≤ R = Σ r_i; the joint SVD is taken on a QR of the stacked B, never on the
    dense updates. O(d_out R² + N d_in R² + N R d_in log(R d_in)).

    Raises:
        MergeError: an option value out of its range.

    Source: Stoica et al. 2025, arXiv 2410.19735.
    """
    check_fraction("density", density)
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: trim(update, density, out=update),
        consensus=elect_and_mean(majority_sign_method),
        space="knots",
        lambda_=lambda_,
    )


@register(
    name="knots_dare_ties",
    title="KnOTS DARE TIES",
    summary="Use DARE TIES in a basis the adapters share rather than on raw entries.",
    paper=_PAPER,
    url=_URL,
    symmetric=False,
    low_rank=True,
)
def knots_dare_ties(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    density: float = 0.5,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
) -> Update:
    """`knots_ties` with DARE's random mask in place of the trim.

    Each entry of a `Σ V_iᵀ` is kept with probability `density` and divided by it.
    O(d_out R² + N d_in R²), R = Σ r_i.

    Raises:
        MergeError: an option value out of its range.

    Source: Stoica et al. 2025, arXiv 2410.19735; Yu et al. 2024, arXiv 2311.03099.
    """
    check_fraction("density", density)
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: random_drop(update, density, generator),
        consensus=elect_and_mean(majority_sign_method),
        space="knots",
        lambda_=lambda_,
    )
