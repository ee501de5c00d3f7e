"""SCE: select by variance, calculate coefficients by energy, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import energy_weighted
from orthomerge.merging.parts.elementwise import elementwise
from orthomerge.merging.parts.options import check_fraction
from orthomerge.merging.registry import Update, register


@register(
    name="sce",
    title="SCE",
    summary="Use to weigh each adapter by its own energy in each layer, without tuning weights.",
    paper="Wan et al. 2024, FuseChat",
    url="https://arxiv.org/abs/2408.07990",
)
def sce(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    select_topk: float = 1.0,
    lambda_: float = 1.0,
    space: str = "delta",
) -> Update:
    """`λ Σ η_i ΔW'_i / Σ η_i` over the adapters that agree with the sign of `Σ ΔW'_i`.

    `ΔW'_i` is `w_i ΔW_i` on the `select_topk` share of entries (of those whose variance over the
    adapters is not zero) with the largest variance, zero elsewhere; all entries at 1. The
    coefficient η_i of a layer is `‖ΔW'_i‖²_F`. Dense `[d_out, d_in]` in the space "delta", factors
    in the others (see `ties`). O(N d_out d_in + d_out d_in log(d_out d_in)).

    Raises:
        MergeError: an option value out of its range.

    Source: Wan et al. 2024, arXiv 2408.07990, section on SCE.
    """
    check_fraction("select_topk", select_topk)

    def select_and_weigh(updates: Tensor, w: Tensor) -> Tensor:
        kept = _select(w[:, None, None] * updates, select_topk)
        return energy_weighted(kept, torch.ones_like(w))

    return elementwise(factors, weights, consensus=select_and_weigh, space=space, lambda_=lambda_)


def _select(updates: Tensor, share: float) -> Tensor:
    """Zero all but the `share` of entries whose variance over the adapters is largest."""
    if share >= 1:
        return updates
    variance = updates.var(dim=0, unbiased=False).flatten()
    chosen = variance.topk(int(share * int(variance.count_nonzero()))).indices
    mask = torch.zeros_like(variance)
    mask[chosen] = 1
    return updates * mask.view_as(updates[0])
