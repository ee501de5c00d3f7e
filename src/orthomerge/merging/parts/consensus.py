"""Consensus: from the stacked updates of N adapters to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.merging.parts.options import check_choice

SIGN_METHODS = ("total", "frequency")
# Numbers of all updates together that are elected and averaged at a time: they stay in the cache.
_IN_CACHE = 1 << 19


def weighted_total(
    updates: Float[Tensor, "n ..."], weights: Float[Tensor, " n"]
) -> Float[Tensor, " ..."]:
    """`Σ w_i ΔW_i`. O(N · n)."""
    return cast(Tensor, torch.tensordot(weights, updates, dims=1))


def majority_sign(updates: Float[Tensor, "n ..."], method: str) -> Float[Tensor, " ..."]:
    """The sign elected at each place, 1 or -1 (a draw elects plus).

    "total" elects the sign of the sum, "frequency" the sign most adapters have; zeros have no vote
    (elect step of TIES, Yadav et al. 2023, arXiv 2306.01708). O(N · n).
    """
    votes = updates if method == "total" else updates.sign()
    return torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0).to(updates)


def disjoint_mean(
    updates: Float[Tensor, "n ..."],
    weights: Float[Tensor, " n"],
    sign: Float[Tensor, " ..."],
) -> Float[Tensor, " ..."]:
    """`Σ w_i ΔW_i / count` at each place over the adapters whose entry has that sign; 0 where none.

    The count is of adapters, not of weight, as in PEFT: with unit weights it is the mean of TIES.
    """
    agreeing = (updates * sign).clamp_(min=0)
    total = weighted_total(agreeing, weights)
    return total.mul_(sign).div_(agreeing.sign_().sum(dim=0).clamp_(min=1))


def elect_and_mean(
    method: str,
) -> Callable[[Float[Tensor, "n ..."], Float[Tensor, " n"]], Float[Tensor, " ..."]]:
    """Elect a sign at each place from the unweighted updates, then the weighted disjoint mean.

    Raises:
        MergeError: not one of the two ways to elect.
    """
    check_choice("majority_sign_method", method, SIGN_METHODS)

    def merged(updates: Float[Tensor, "n ..."], weights: Float[Tensor, " n"]) -> Tensor:
        result = torch.empty_like(updates[0])
        rows = max(_IN_CACHE // max(updates[:, :1].numel(), 1), 1)
        for start in range(0, updates.shape[1], rows):
            chunk = updates[:, start : start + rows]
            result[start : start + rows] = disjoint_mean(
                chunk, weights, majority_sign(chunk, method)
            )
        return result

    return merged


def energy_weighted(
    updates: Float[Tensor, "n rows columns"],
    weights: Float[Tensor, " n"],
    select_topk: float = 1.0,
) -> Float[Tensor, "rows columns"]:
    """`Σ η_i ΔW'_i / Σ η_i` over those that agree with the sign of `Σ ΔW'_i`, `η_i = ‖ΔW'_i‖²`.

    `ΔW'_i` is `w_i ΔW_i` on the `select_topk` share of entries (of those that vary at all) of
    largest variance over the adapters, zero elsewhere. Select, calculate and erase of SCE (Wan et
    al. 2024, arXiv 2408.07990). O(N · n), and O(n log n) where entries are selected.
    """
    weighted = _of_most_variance(weights[:, None, None] * updates, select_topk)
    energy = weighted.square().sum(dim=(1, 2), keepdim=True)
    coefficients = energy * (weighted * majority_sign(weighted, "total") > 0)
    total = coefficients.sum(dim=0)
    return (coefficients * weighted).sum(dim=0) / torch.where(total == 0, 1.0, total)


def _of_most_variance(
    updates: Float[Tensor, "n rows columns"], share: float
) -> Float[Tensor, "n rows columns"]:
    """Zero all but the `share` of entries whose variance over the adapters is largest."""
    if share >= 1:
        return updates
    variance = updates.var(dim=0, unbiased=False).flatten()
    chosen = variance.topk(int(share * int(variance.count_nonzero()))).indices
    mask = torch.zeros_like(variance)
    mask[chosen] = 1
    return updates * mask.view_as(updates[0])
