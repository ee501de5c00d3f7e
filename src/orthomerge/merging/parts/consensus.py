"""Consensus: from the stacked updates of N adapters to one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SIGN_METHODS = ("total", "frequency")


def weighted_total(
    updates: Float[Tensor, "n ..."], weights: Float[Tensor, " n"]
) -> Float[Tensor, " ..."]:
    """`Σ w_i ΔW_i`. O(N · n)."""
    return torch.tensordot(weights, updates, dims=1)


def majority_sign(updates: Float[Tensor, "n ..."], method: str) -> Bool[Tensor, "n ..."]:
    """Which entries agree with the sign elected at their place (a draw elects plus).

    "total" elects the sign of the sum, "frequency" the sign most adapters have; zeros have no vote
    and never agree (elect step of TIES, Yadav et al. 2023, arXiv 2306.01708). O(N · n).
    """
    votes = updates if method == "total" else updates.sign()
    elected = torch.where(votes.sum(dim=0) >= 0, 1, -1)
    return updates.sign() == elected


def disjoint_mean(
    updates: Float[Tensor, "n ..."],
    weights: Float[Tensor, " n"],
    agrees: Bool[Tensor, "n ..."],
) -> Float[Tensor, " ..."]:
    """`Σ w_i ΔW_i / count` at each place over the adapters that agree; 0 where none. O(N · n).

    The count is of adapters, not of weight, as in PEFT: with unit weights it is the mean of TIES.
    """
    kept = torch.where(agrees, updates, torch.zeros_like(updates))
    return weighted_total(kept, weights) / agrees.sum(dim=0).clamp(min=1)


def elect_and_mean(
    updates: Float[Tensor, "n ..."], weights: Float[Tensor, " n"], method: str
) -> Float[Tensor, " ..."]:
    """Elect a sign at each place from the unweighted updates, then the weighted disjoint mean."""
    return disjoint_mean(updates, weights, majority_sign(updates, method))
