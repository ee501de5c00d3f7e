"""The sum of magnitude-pruned updates."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import weighted_total
from orthomerge.merging.parts.elementwise import elementwise
from orthomerge.merging.parts.options import check_fraction
from orthomerge.merging.parts.sparsify import trim
from orthomerge.merging.registry import Update, register


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
) -> Update:
    """`Σ w_i trim(ΔW_i)`: each update keeps its `density` share of largest entries.

    Dense `[d_out, d_in]` in the space "delta", factors in the others (see `ties`). O(N d_out d_in).

    Raises:
        MergeError: an option value out of its range.

    Source: PEFT, `peft.utils.merge_utils.magnitude_prune`.
    """
    check_fraction("density", density)
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: trim(update, density, out=update),
        consensus=weighted_total,
        space=space,
    )
