"""A merge composed of a sparsifier, a consensus and a space, published or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import elect_and_mean, energy_weighted, weighted_total
from orthomerge.merging.parts.elementwise import Consensus, Sparsify, elementwise
from orthomerge.merging.parts.options import check_choice, check_fraction
from orthomerge.merging.parts.sparsify import band, check_epsilon, magprune, random_drop, trim
from orthomerge.merging.registry import Update

# Each choice with the options that it reads.
SPARSIFIERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "trim": ("density",),
    "random_drop": ("density",),
    "magprune": ("density", "epsilon"),
    "band": ("density", "gamma"),
}
CONSENSUS: dict[str, tuple[str, ...]] = {
    "sum": (),
    "elect": ("majority_sign_method",),
    "energy": ("select_topk",),
}
RANDOM = ("random_drop", "magprune")


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
    select_topk: float = 1.0,
    lambda_: float = 1.0,
) -> Update:
    """`λ · consensus(sparsifier(ΔW_1), ..., sparsifier(ΔW_N); w)` in a space.

    - sparsifier: "none", "trim" (TIES), "random_drop" (DARE), "magprune" (DELLA, with `epsilon`),
      "band" (Breadcrumbs, with `gamma`); `density` is the share that is kept.
    - consensus: "sum", "elect" (TIES, with `majority_sign_method`), "energy" (SCE, with
      `select_topk`).
    - space: "delta", "factors" (cross terms), "knots", "core".

    `ties` is trim × elect × delta, `knots_dare_ties` is random_drop × elect × knots: the methods
    of this family are rows of one table (`merging/elementwise.py`).
    O(N d_out d_in) in the space "delta" (times log d_in for "magprune"), less in the others.

    Raises:
        MergeError: an option value that is unknown or out of its range.

    Source: the papers of the parts.
    """
    check_choice("sparsifier", sparsifier, [*SPARSIFIERS])
    check_choice("consensus", consensus, [*CONSENSUS])
    check_fraction("density", density)
    check_fraction("gamma", gamma, zero=True)
    check_fraction("epsilon", epsilon, zero=True)
    check_fraction("select_topk", select_topk)
    combine: Consensus = {
        "sum": weighted_total,
        "elect": elect_and_mean(majority_sign_method),
        "energy": partial(energy_weighted, select_topk=select_topk),
    }[consensus]
    return elementwise(
        factors,
        weights,
        sparsify=_sparsify(sparsifier, density, gamma, epsilon, generator),
        consensus=combine,
        space=space,
        lambda_=lambda_,
    )


def _sparsify(
    name: str, density: float, gamma: float, epsilon: float, generator: torch.Generator | None
) -> Sparsify | None:
    """The sparsifier of that name with its options bound; None for all entries."""

    def trimmed(update: Tensor) -> Tensor:
        return trim(update, density, out=update)

    def dropped(update: Tensor) -> Tensor:
        return random_drop(update, density, generator, out=update)

    if name == "trim":
        return trimmed
    if name == "random_drop":
        return dropped
    if name == "magprune":
        check_epsilon(density, epsilon)
        return partial(magprune, density=density, epsilon=epsilon, generator=generator)
    if name == "band":
        if density + gamma > 1 + 1e-9:
            raise MergeError(
                f"options 'density' and 'gamma' must sum to at most 1, not {density} + {gamma}."
            )
        return partial(band, density=density, gamma=gamma)
    return None
