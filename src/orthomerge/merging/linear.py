"""The exact weighted sum, kept in factors."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.merging.parts.options import check_bool
from orthomerge.merging.registry import register


@register(
    name="linear",
    title="Linear",
    summary="Use for adapters made to be mergeable: the exact weighted sum of the updates.",
    paper="Wortsman et al. 2022, Model soups",
    url="https://arxiv.org/abs/2203.05482",
    low_rank=True,
)
def linear(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, normalize: bool = False
) -> LoraFactors:
    """The exact `Σ w_i ΔW_i` (divided by `Σ w_i` if `normalize`), of rank Σ r_i, nothing rounded.

    A's rows and B's columns are stacked, weights and scalings go into B: unlike PEFT's "linear",
    which adds √w_i A_i and √w_i B_i and so has cross terms. O(Σ r_i (d_in + d_out)).

    Raises:
        MergeError: `normalize` and the weights sum to zero.

    Source: Wortsman et al. 2022, arXiv 2203.05482 (averaging weights).
    """
    check_bool("normalize", normalize)
    if normalize:
        total = sum(weights)
        if total == 0:
            raise MergeError("option 'normalize' needs weights that do not sum to zero.")
        weights = [w / total for w in weights]
    return weighted_sum(factors, weights)


register(
    name="cat",
    title="Concatenation",
    summary="PEFT's name for the exact weighted sum: the same result as linear.",
    paper="PEFT, add_weighted_adapter",
    url="https://huggingface.co/docs/peft/developer_guides/model_merging",
    low_rank=True,
)(linear)
