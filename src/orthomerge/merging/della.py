"""DELLA: random dropping by magnitude, then the election and mean of TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import elect_and_mean
from orthomerge.merging.parts.elementwise import elementwise
from orthomerge.merging.parts.options import check_fraction
from orthomerge.merging.parts.sparsify import check_epsilon, magprune
from orthomerge.merging.registry import Update, register


@register(
    name="della",
    title="DELLA",
    summary="Use in place of DARE TIES to keep large entries with a higher probability.",
    paper="Deep et al. 2024, DELLA-Merging",
    url="https://arxiv.org/abs/2406.11617",
    symmetric=False,
)
def della(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    density: float = 0.5,
    epsilon: float = 0.1,
    majority_sign_method: str = "total",
    lambda_: float = 1.0,
    space: str = "delta",
) -> Update:
    """`λ · mean over agreeing i of w_i magprune(ΔW_i)`, the sign of each entry elected by all.

    In each row an entry is kept with a probability that runs, by rank of magnitude, from
    density - ε/2 (smallest) to density + ε/2 (largest), and divided by it; density 1 keeps all.
    Dense `[d_out, d_in]` in the space "delta", factors in the others (see `ties`).
    O(N d_out d_in log d_in).

    Raises:
        MergeError: an option value out of its range, or density ± ε/2 outside (0, 1].

    Source: Deep et al. 2024, arXiv 2406.11617.
    """
    check_fraction("density", density)
    check_epsilon(density, epsilon)
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: magprune(update, density, epsilon, generator),
        consensus=elect_and_mean(majority_sign_method),
        space=space,
        lambda_=lambda_,
    )
