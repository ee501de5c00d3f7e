"""KnOTS: one shared left basis by a joint SVD, then TIES on what each adapter does with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import SIGN_METHODS, elect_and_mean
from orthomerge.merging.parts.lowrank import nonzero, numerical_rank, zero_like
from orthomerge.merging.parts.options import check_choice, check_fraction, check_number
from orthomerge.merging.parts.sparsify import trim
from orthomerge.merging.registry import register


@register(
    name="knots_ties",
    title="KnOTS TIES",
    summary="Use TIES in a basis the adapters share rather than on raw entries.",
    paper="Stoica et al. 2025, Model merging with SVD to tie the KnOTS",
    url="https://arxiv.org/abs/2410.19735",
    low_rank=True,
)
def knots_ties(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
) -> LoraFactors:
    """`λ U ties(Σ V_1ᵀ, ..., Σ V_Nᵀ)` where `[ΔW_1 ... ΔW_N] = U Σ [V_1ᵀ ... V_Nᵀ]`.

    TIES (trim, elect, disjoint mean, here per layer) works on the `[k, d_in]` matrices of the
    shared basis, k ≤ Σ r_i; the joint SVD is taken on a QR of the stacked B, never on the dense
    updates. O(d_out R² + N d_in R² + N R d_in log(R d_in)), R = Σ r_i.

    Raises:
        MergeError: an option value out of its range.

    Source: Stoica et al. 2025, arXiv 2410.19735.
    """
    check_fraction("density", density)
    check_choice("majority_sign_method", majority_sign_method, SIGN_METHODS)
    check_number("lambda_", lambda_)
    first = factors[0]
    present, kept_weights = nonzero(factors, weights)
    if not present:
        return zero_like(first)
    Q, R = torch.linalg.qr(torch.cat([f.scaling * f.B.double() for f in present], dim=1))
    blocks = [
        r @ f.A.double()
        for r, f in zip(R.split([f.rank for f in present], 1), present, strict=True)
    ]
    P, s, Vh = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    k = numerical_rank(s, max(first.shape), first.A.dtype)
    rows = torch.stack((s[:k, None] * Vh[:k]).split(first.shape[1], dim=1))
    trimmed = torch.stack([trim(row, density) for row in rows])
    merged = elect_and_mean(trimmed, rows.new_tensor(kept_weights), majority_sign_method)
    return LoraFactors(merged.to(first.A), (Q @ P[:, :k]).to(first.B), lambda_)
