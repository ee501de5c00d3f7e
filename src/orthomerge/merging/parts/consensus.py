"""Consensus: from the stacked updates of N adapters to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from orthomerge.merging.parts.options import check_choice

SIGN_METHODS = ("total", "frequency")
# Numbers of all updates together that are elected and averaged at a time: they stay in the cache.
_IN_CACHE = 1 << 18


def weighted_total(
    updates: Float[Tensor, "n ..."], weights: Float[Tensor, " n"]
) -> Float[Tensor, " ..."]:
    """`Σ w_i ΔW_i`. O(N · n)."""
    return cast(Tensor, torch.tensordot(weights, updates, dims=1))


def majority_sign(updates: Float[Tensor, "n ..."], method: str) -> Bool[Tensor, "n ..."]:
    """Which entries agree with the sign elected at their place (a draw elects plus).

    "total" elects the sign of the sum, "frequency" the sign most adapters have; zeros have no vote
    and never agree (elect step of TIES, Yadav et al. 2023, arXiv 2306.01708). O(N · n).
    """
    votes = updates if method == "total" else updates.sign()
    return updates * torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0).to(updates) > 0


def disjoint_mean(
    updates: Float[Tensor, "n ..."],
    weights: Float[Tensor, " n"],
    agrees: Bool[Tensor, "n ..."],
) -> Float[Tensor, " ..."]:
    """`Σ w_i ΔW_i / count` at each place over the adapters that agree; 0 where none. O(N · n).

    The count is of adapters, not of weight, as in PEFT: with unit weights it is the mean of TIES.
    """
    total = torch.zeros_like(updates[0])
    count = torch.zeros_like(updates[0])
    # One adapter after the other: nothing of the size of all of them is written again.
    shares = cast(list[float], weights.tolist())
    for update, weight, agree in zip(updates, shares, agrees, strict=True):
        kept = agree.to(update)
        count += kept
        total.addcmul_(update, kept, value=weight)
    return total.div_(count.clamp_(min=1))


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
            piece = updates[:, start : start + rows]
            result[start : start + rows] = disjoint_mean(
                piece, weights, majority_sign(piece, method)
            )
        return result

    return merged


def energy_weighted(
    updates: Float[Tensor, "n rows columns"], weights: Float[Tensor, " n"]
) -> Float[Tensor, "rows columns"]:
    """`Σ η_i w_i ΔW_i / Σ η_i` over those that agree with the sign of `Σ w_i ΔW_i`.

    `η_i = ‖w_i ΔW_i‖²`: the calculate and erase steps of SCE (Wan et al. 2024, arXiv 2408.07990).
    O(N · n).
    """
    weighted = weights[:, None, None] * updates
    energy = weighted.square().sum(dim=(1, 2), keepdim=True)
    coefficients = energy * majority_sign(weighted, "total")
    total = coefficients.sum(dim=0)
    return (coefficients * weighted).sum(dim=0) / torch.where(total == 0, 1.0, total)
