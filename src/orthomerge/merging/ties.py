"""TIES: trim, elect a sign, mean of those that agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import SIGN_METHODS, elect_and_mean
from orthomerge.merging.parts.options import check_choice, check_fraction, check_number
from orthomerge.merging.parts.space import SPACES, combine_in, scale
from orthomerge.merging.parts.sparsify import trim
from orthomerge.merging.registry import register


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
) -> LoraFactors | Tensor:
    """`λ · mean over agreeing i of w_i trim(ΔW_i)`, the sign of each entry elected by all.

    Each update keeps its `density` share of largest entries; at each place "total" elects the sign
    of the sum (of the unweighted updates), "frequency" the commonest sign; the mean is over the
    entries that have it. Dense `[d_out, d_in]`; `space="factors"` does it on A and B apart, as
    PEFT does, with cross terms. O(N d_out d_in log(d_out d_in)).

    Raises:
        MergeError: an option value out of its range.

    Source: Yadav et al. 2023, arXiv 2306.01708, algorithm 1.
    """
    check_fraction("density", density)
    check_choice("majority_sign_method", majority_sign_method, SIGN_METHODS)
    check_number("lambda_", lambda_)
    check_choice("space", space, SPACES)

    def combine(updates: Tensor, w: Tensor) -> Tensor:
        trimmed = torch.stack([trim(update, density) for update in updates])
        return elect_and_mean(trimmed, w, majority_sign_method)

    return scale(combine_in(space, factors, weights, combine), lambda_)
