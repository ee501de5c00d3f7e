"""The sum of magnitude-pruned updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import weighted_total
from orthomerge.merging.parts.options import check_choice, check_fraction
from orthomerge.merging.parts.space import SPACES, combine_in
from orthomerge.merging.parts.sparsify import trim
from orthomerge.merging.registry import register


@register(
    name="magnitude_prune",
    title="Magnitude pruning",
    summary="Use to drop each adapter's small entries before summing, without a sign election.",
    paper="PEFT, add_weighted_adapter",
    url="https://huggingface.co/docs/peft/developer_guides/model_merging",
)
def magnitude_prune(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    space: str = "delta",
) -> LoraFactors | Tensor:
    """`Σ w_i trim(ΔW_i)`: each update keeps its `density` share of largest entries.

    Dense `[d_out, d_in]`; `space="factors"` does it on A and B apart, as PEFT does, with cross
    terms. O(N d_out d_in log(d_out d_in)).

    Raises:
        MergeError: an option value out of its range.

    Source: PEFT, `peft.utils.merge_utils.magnitude_prune`.
    """
    check_fraction("density", density)
    check_choice("space", space, SPACES)

    def combine(updates: Tensor, w: Tensor) -> Tensor:
        return weighted_total(torch.stack([trim(update, density) for update in updates]), w)

    return combine_in(space, factors, weights, combine)
