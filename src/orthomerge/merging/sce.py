"""SCE: select by variance, calculate coefficients by energy, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import majority_sign
from orthomerge.merging.parts.options import check_fraction, check_number
from orthomerge.merging.registry import register


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
) -> Tensor:
    """`λ Σ η_i ΔW'_i / Σ η_i` over the adapters that agree with the sign of `Σ ΔW'_i`.

    `ΔW'_i` is `w_i ΔW_i` on the `select_topk` share of entries (of those whose variance over the
    adapters is not zero) with the largest variance, zero elsewhere; all entries at 1. The
    coefficient η_i of a layer is `‖ΔW'_i‖²_F`. Dense `[d_out, d_in]`.
    O(N d_out d_in + d_out d_in log(d_out d_in)).

    Raises:
        MergeError: an option value out of its range.

    Source: Wan et al. 2024, arXiv 2408.07990, section on SCE.
    """
    check_fraction("select_topk", select_topk)
    check_number("lambda_", lambda_)
    updates = torch.stack([w * f.delta() for f, w in zip(factors, weights, strict=True)])
    if select_topk < 1:
        variance = updates.var(dim=0, unbiased=False).flatten()
        chosen = variance.topk(int(select_topk * int(variance.count_nonzero()))).indices
        mask = torch.zeros_like(variance)
        mask[chosen] = 1
        updates = updates * mask.view_as(updates[0])
    energy = updates.square().sum(dim=(1, 2), keepdim=True)
    coefficients = energy * majority_sign(updates, "total")
    total = coefficients.sum(dim=0)
    mixed = (coefficients * updates).sum(dim=0) / torch.where(total == 0, 1.0, total)
    return lambda_ * mixed
