"""DELLA: random dropping by magnitude, then the election and mean of TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import SIGN_METHODS, elect_and_mean
from orthomerge.merging.parts.options import check_choice, check_fraction, check_number
from orthomerge.merging.parts.space import SPACES, combine_in, scale
from orthomerge.merging.parts.sparsify import magprune
from orthomerge.merging.registry import register


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
) -> LoraFactors | Tensor:
    """`λ · mean over agreeing i of w_i magprune(ΔW_i)`, the sign of each entry elected by all.

    In each row an entry is kept with a probability that runs, by rank of magnitude, from
    density - ε/2 (smallest) to density + ε/2 (largest), and divided by it; density 1 keeps all.
    Dense `[d_out, d_in]`; `space="factors"` does it on A and B apart, with cross terms.
    O(N d_out d_in log d_in).

    Raises:
        MergeError: an option value out of its range, or density ± ε/2 outside (0, 1].

    Source: Deep et al. 2024, arXiv 2406.11617.
    """
    check_fraction("density", density)
    check_fraction("epsilon", epsilon, zero=True)
    if density < 1 and not (density - epsilon / 2 > 0 and density + epsilon / 2 <= 1):
        raise MergeError(
            f"option 'epsilon' must keep density ± epsilon/2 within (0, 1], not {epsilon} "
            f"at density {density}."
        )
    check_choice("majority_sign_method", majority_sign_method, SIGN_METHODS)
    check_number("lambda_", lambda_)
    check_choice("space", space, SPACES)

    def combine(updates: Tensor, w: Tensor) -> Tensor:
        pruned = torch.stack([magprune(update, density, epsilon, generator) for update in updates])
        return elect_and_mean(pruned, w, majority_sign_method)

    return scale(combine_in(space, factors, weights, combine), lambda_)
