"""DARE: drop entries at random, rescale the rest, then sum or elect."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import elect_and_mean, weighted_total
from orthomerge.merging.parts.elementwise import elementwise
from orthomerge.merging.parts.options import check_fraction
from orthomerge.merging.parts.sparsify import random_drop
from orthomerge.merging.registry import Update, register

_PAPER = "Yu et al. 2024, Language Models are Super Mario"
_URL = "https://arxiv.org/abs/2311.03099"


@register(
    name="dare_linear",
    title="DARE linear",
    summary="Use to thin the updates at random, without bias, before summing them.",
    paper=_PAPER,
    url=_URL,
    symmetric=False,
)
def dare_linear(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    density: float = 0.5,
    space: str = "delta",
) -> Update:
    """`Σ w_i M_i ⊙ ΔW_i / density`, the masks M_i of independent draws with P(1) = density.

    The expectation is the linear merge. Dense `[d_out, d_in]` in the space "delta", factors in the
    others (see `ties`). Draws are made adapter by adapter, A before B; the
    paper's drop rate is 1 - density. O(N d_out d_in).

    Raises:
        MergeError: an option value out of its range.

    Source: Yu et al. 2024, arXiv 2311.03099.
    """
    check_fraction("density", density)
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: random_drop(update, density, generator),
        consensus=weighted_total,
        space=space,
    )


@register(
    name="dare_ties",
    title="DARE TIES",
    summary="Use to thin the updates at random before a sign election.",
    paper=_PAPER,
    url=_URL,
    symmetric=False,
)
def dare_ties(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    density: float = 0.5,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
    space: str = "delta",
) -> Update:
    """TIES with DARE's random mask in place of the trim: `λ · mean over agreeing i`.

    Each entry is kept with probability `density` and divided by it; then signs are elected and
    those that agree averaged, as in `ties`. Dense `[d_out, d_in]` in the space "delta", factors
    in the others. O(N d_out d_in).

    Raises:
        MergeError: an option value out of its range.

    Source: Yu et al. 2024, arXiv 2311.03099; Yadav et al. 2023, arXiv 2306.01708.
    """
    check_fraction("density", density)
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: random_drop(update, density, generator),
        consensus=elect_and_mean(majority_sign_method),
        space=space,
        lambda_=lambda_,
    )
