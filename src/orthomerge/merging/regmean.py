"""RegMean: the update whose outputs on every task's inputs are closest to the adapters' own."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.least_squares import least_squares
from orthomerge.merging.parts.options import check_fraction, check_positive
from orthomerge.merging.registry import register
from orthomerge.moments import Moment


@register(
    name="regmean",
    title="RegMean",
    summary="Use when you have each task's statistics: it matches every adapter's own outputs.",
    paper="Jin et al. 2023, Dataless knowledge fusion by merging weights of language models",
    url="https://arxiv.org/abs/2212.09849",
    low_rank=True,
)
def regmean(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    moments: Sequence[Moment],
    alpha: float = 0.9,
    ridge: float = 1e-2,
) -> LoraFactors:
    """`(Σ w_i ΔW_i G_i) (Σ G_i)⁻¹` with `G_i = α S_i + (1-α) diag(S_i)`, S_i the task's moment.

    The least squares solution of `Σ ‖(ΔW - w_i ΔW_i) H_iᵀ‖²`, with the off-diagonal of the Gram
    matrices scaled by `alpha` as the paper does. No data is needed beside the statistics files. The
    result is in factors of rank Σ r_i: `B_i` stay, `A_i` become `A_i G_i (Σ G_i)⁻¹`.
    `ridge`, in units of its mean diagonal, is added to every G_i: where no task has inputs the
    updates are averaged. The paper has none, and few rows with a large common mean then make the
    result many times longer than the updates together. Whether adapters share an initialization of
    A does not matter, since only the G_i are inverted. O(R d_in² + d_in³), or O(k² d_in) from k
    rows.

    Raises:
        MergeError: an option value out of its range.

    Source: Jin et al. 2023, arXiv 2212.09849, equation 3 and section 4.
    """
    check_fraction("alpha", alpha, zero=True)
    check_positive("ridge", ridge)
    shares = [1.0] * len(factors)
    return least_squares(factors, weights, moments, shares, alpha=alpha, ridge=ridge)[0]
