"""RobustMerge: prune A and B, scale up what pruning weakened, sum A and B apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.options import check_fraction, check_number
from orthomerge.merging.parts.space import stacked_factors
from orthomerge.merging.parts.sparsify import trim
from orthomerge.merging.registry import register


@register(
    name="robust_merge",
    title="RobustMerge",
    summary="Use for adapters of one rank whose small singular directions matter.",
    paper="Zeng et al. 2025, RobustMerge",
    url="https://arxiv.org/abs/2502.17159",
    low_rank=True,
)
def robust_merge(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lambda_: float = 2.0,
) -> LoraFactors:
    """`λ (Σ w_i B̃_i S̃_i) (Σ Ã_i)`, Ã and B̃ the `density` share of largest entries of A and B.

    `S_i = diag(Σ_j |A_kj| / Σ_j |Ã_kj|)` is what pruning took from row k, and `S̃_i = S_i / Σ S_i`
    makes the adapters' scales comparable. As the product of two sums it has cross terms `B_i A_j`.
    An adapter that is zero here takes no part. O(N r (d_in + d_out)).

    Raises:
        MergeError: an option value out of its range.
        LayerProblem: the ranks differ.

    Source: Zeng et al. 2025, arXiv 2502.17159, equations 6 to 9 (its pruning rate is 1 - density).
    """
    check_fraction("density", density)
    check_number("lambda_", lambda_)
    A, B = stacked_factors(factors, "robust_merge", "use another method, as 'ties'")
    scalings = A.new_tensor([w * f.scaling for f, w in zip(factors, weights, strict=True)])
    there = (A.flatten(1).any(dim=1) & B.flatten(1).any(dim=1))[:, None, None]
    A, B = torch.where(there, A, 0.0), torch.where(there, B, 0.0)
    kept_A = torch.stack([trim(a, density) for a in A])
    kept_B = torch.stack([trim(b, density) for b in B])
    whole, left = A.abs().sum(dim=2), kept_A.abs().sum(dim=2)  # [N, r]
    scale = torch.where(left > 0, whole / torch.where(left > 0, left, 1.0), 0.0)
    shared = scale.sum(dim=0)
    scale = scale / torch.where(shared > 0, shared, 1.0)
    merged_B = torch.einsum("n,ndr,nr->dr", scalings, kept_B, scale)
    return LoraFactors(kept_A.sum(dim=0), merged_B, lambda_)
