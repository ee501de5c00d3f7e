"""A merge composed of a sparsifier, a consensus and a space, published or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import elect_and_mean, energy_weighted, weighted_total
from orthomerge.merging.parts.elementwise import Consensus, elementwise
from orthomerge.merging.parts.options import check_choice, check_fraction
from orthomerge.merging.parts.sparsify import band, check_epsilon, magprune, random_drop, trim
from orthomerge.merging.registry import Update, register

SPARSIFIERS = ("none", "trim", "random_drop", "magprune", "band")
CONSENSUS = ("sum", "elect", "energy")


@register(
    name="compose",
    title="Composed",
    summary="Use to combine a sparsifier, a consensus and a space that no paper has combined.",
    paper="the parts of TIES, DARE, DELLA, Breadcrumbs, SCE, KnOTS and core space",
    url="https://arxiv.org/abs/2306.01708",
    symmetric=False,
)
def compose(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    sparsifier: str = "none",
    consensus: str = "sum",
    space: str = "delta",
    density: float = 0.5,
    gamma: float = 0.01,
    epsilon: float = 0.1,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
) -> Update:
    """`λ · consensus(sparsifier(ΔW_1), ..., sparsifier(ΔW_N); w)` in a space.

    - sparsifier: "none", "trim" (TIES), "random_drop" (DARE), "magprune" (DELLA, with `epsilon`),
      "band" (Breadcrumbs, with `gamma`); `density` is the share that is kept.
    - consensus: "sum", "elect" (TIES, with `majority_sign_method`), "energy" (SCE).
    - space: "delta", "factors" (cross terms), "knots", "core".

    `ties` is trim × elect × delta, `knots_dare_ties` is random_drop × elect × knots, and so on.
    O(N d_out d_in) in the space "delta" (times log d_in for "magprune"), less in the others.

    Raises:
        MergeError: an option value that is unknown or out of its range.

    Source: the papers of the parts.
    """
    check_choice("sparsifier", sparsifier, SPARSIFIERS)
    check_choice("consensus", consensus, CONSENSUS)
    check_fraction("density", density)
    check_fraction("gamma", gamma, zero=True)
    check_epsilon(density, epsilon)
    combine: Consensus = {
        "sum": weighted_total,
        "elect": elect_and_mean(majority_sign_method),
        "energy": energy_weighted,
    }[consensus]

    def sparsify(update: Tensor) -> Tensor:
        if sparsifier == "trim":
            return trim(update, density)
        if sparsifier == "random_drop":
            return random_drop(update, density, generator)
        if sparsifier == "magprune":
            return magprune(update, density, epsilon, generator)
        if sparsifier == "band":
            return band(update, density, gamma)
        return update

    return elementwise(
        factors, weights, sparsify=sparsify, consensus=combine, space=space, lambda_=lambda_
    )
