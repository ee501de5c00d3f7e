"""Task arithmetic: one coefficient on the exact sum."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.merging.parts.options import check_number
from orthomerge.merging.registry import register


@register(
    name="task_arithmetic",
    title="Task arithmetic",
    summary="Use to scale the exact sum by one coefficient chosen on held-out data.",
    paper="Ilharco et al. 2023, Editing models with task arithmetic",
    url="https://arxiv.org/abs/2212.04089",
    low_rank=True,
)
def task_arithmetic(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, lambda_: float = 1.0
) -> LoraFactors:
    """`λ Σ w_i ΔW_i`, exact in factors of rank Σ r_i. O(Σ r_i (d_in + d_out)).

    Raises:
        MergeError: `lambda_` is not a finite number.

    Source: Ilharco et al. 2023, arXiv 2212.04089.
    """
    check_number("lambda_", lambda_)
    return weighted_sum(factors, [lambda_ * w for w in weights])
