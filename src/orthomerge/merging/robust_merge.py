"""RobustMerge: prune A and B, scale up what pruning weakened, sum A and B apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.options import check_fraction, check_number
from orthomerge.merging.parts.space import stacked_factors
from orthomerge.merging.parts.sparsify import keep_largest
from orthomerge.merging.registry import register


@register(
    name="robust_merge",
    title="RobustMerge",
    summary="Use for adapters of one rank whose small singular directions matter.",
    paper="Zeng et al. 2025, RobustMerge",
    url="https://arxiv.org/abs/2502.17159",
    low_rank=True,
    by_factors=True,
)
def robust_merge(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lambda_: float = 2.0,
    att_ratio: float = 0.2,
) -> LoraFactors:
    """`(λ Σ w_i B̃_i S̃_i) (λ Σ Ã_i)`, Ã and B̃ the `density` share of largest entries of A and B.

    `S_i = diag(Σ_j |A_kj| / Σ_j |Ã_kj|)` is what pruning took from row k. Entries of S_i below the
    smallest of its `att_ratio` share of largest ones are raised to that one, and
    `S̃_i = S_i / Σ S_i` makes the adapters' scales comparable. Defaults are those of the authors'
    script, where λ = 2 stands on A and on B, 4 on the product. The paper's equations 6 to 9 have
    one λ and raise nothing: that is `lambda_` = √λ and `att_ratio` = 1. As the product of two sums
    the result has cross terms `B_i A_j`, which change with how an update is split between A and B.
    An adapter that is zero here takes no part. O(N r (d_in + d_out)).

    Raises:
        MergeError: an option value out of its range.
        LayerProblem: the ranks differ.

    Source: Zeng et al. 2025, arXiv 2502.17159 (its pruning rate is 1 - density), and its code.
    """
    check_fraction("density", density)
    check_number("lambda_", lambda_)
    check_fraction("att_ratio", att_ratio)
    A, B = stacked_factors(factors, "robust_merge", "use another method, as 'ties'")
    scalings = A.new_tensor([w * f.scaling for f, w in zip(factors, weights, strict=True)])
    there = (A.flatten(1).any(dim=1) & B.flatten(1).any(dim=1))[:, None, None]
    A, B = torch.where(there, A, 0.0), torch.where(there, B, 0.0)
    kept_A = torch.stack([_largest(a, density) for a in A])
    kept_B = torch.stack([_largest(b, density) for b in B])
    whole, left = A.abs().sum(dim=2), kept_A.abs().sum(dim=2)  # [N, r]
    scale = torch.where(left > 0, whole / torch.where(left > 0, left, 1.0), 0.0)
    scale = _raised(scale, att_ratio)
    shared = scale.sum(dim=0)
    scale = scale / torch.where(shared > 0, shared, 1.0)
    merged_B = torch.einsum("n,ndr,nr->dr", scalings, kept_B, scale)
    return LoraFactors(lambda_ * kept_A.sum(dim=0), lambda_ * merged_B, 1.0)


def _largest(matrix: Float[Tensor, "m n"], density: float) -> Float[Tensor, "m n"]:
    """The entries that are as large as the script's threshold: one more than `density` of them."""
    size = matrix.numel()
    count = size - int(size * (1 - density)) + 1
    return keep_largest(matrix, count) if count < size else matrix


def _raised(scale: Float[Tensor, "n r"], att_ratio: float) -> Float[Tensor, "n r"]:
    """Each row with no entry below its entry number `⌊r (1 - att_ratio)⌋` in ascending order."""
    rank = scale.shape[1]
    if not rank:
        return scale
    place = min(int(rank * (1 - att_ratio)), rank - 1)
    least = scale.sort(dim=1).values[:, place : place + 1]
    return torch.maximum(scale, least)
