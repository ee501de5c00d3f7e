"""The best low-rank approximation of the exact sum."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.factors import LoraFactors, truncate_measured, weighted_sum
from orthomerge.merging.parts.options import check_rank
from orthomerge.merging.registry import Truncated, register


@register(
    name="svd",
    title="SVD",
    summary="Use when the merged adapter must stay as small as its inputs.",
    paper="Eckart & Young 1936; PEFT, add_weighted_adapter",
    url="https://doi.org/10.1007/BF02288367",
    low_rank=True,
    default_weight="1/√N",
)
def svd(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, rank: int | None = None
) -> Truncated:
    """The rank-k matrix closest in Frobenius norm to `Σ w_i ΔW_i`; k is the largest input rank.

    The dense update is never formed: O((d_in + d_out) R² + R³), R = Σ r_i.

    Raises:
        MergeError: `rank` is not a whole number of at least 1.

    Source: Eckart & Young 1936, doi 10.1007/BF02288367.
    """
    check_rank("rank", rank)
    keep = rank if rank is not None else max(f.rank for f in factors)
    return Truncated(*truncate_measured(weighted_sum(factors, weights), keep))
