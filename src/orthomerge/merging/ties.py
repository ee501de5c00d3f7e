"""TIES: trim, elect a sign, mean of those that agree."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import elect_and_mean
from orthomerge.merging.parts.elementwise import elementwise
from orthomerge.merging.parts.options import check_fraction
from orthomerge.merging.parts.sparsify import trim
from orthomerge.merging.registry import Update, register


@register(
    name="ties",
    title="TIES",
    summary="Use when the adapters' entries pull in opposite directions.",
    paper="Yadav et al. 2023, TIES-Merging",
    url="https://arxiv.org/abs/2306.01708",
)
def ties(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
    space: str = "delta",
) -> Update:
    """`λ · mean over agreeing i of w_i trim(ΔW_i)`, the sign of each entry elected by all.

    Each update keeps its `density` share of largest entries; at each place "total" elects the sign
    of the sum (of the unweighted updates), "frequency" the commonest sign; the mean is over the
    entries that have it. Dense `[d_out, d_in]` in the space "delta"; "knots" and "core" work in
    a basis the adapters share, "factors" on A and B apart, as PEFT does, with cross terms.
    O(N d_out d_in).

    Raises:
        MergeError: an option value out of its range.

    Source: Yadav et al. 2023, arXiv 2306.01708, algorithm 1.
    """
    check_fraction("density", density)
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: trim(update, density, out=update),
        consensus=elect_and_mean(majority_sign_method),
        space=space,
        lambda_=lambda_,
    )
