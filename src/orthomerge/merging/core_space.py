"""Core space: any merge, on the small matrices the adapters become in a basis they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.inner import inner_method, inner_rule
from orthomerge.merging.parts.lowrank import nonzero, zero_like
from orthomerge.merging.parts.space import core_coordinates
from orthomerge.merging.registry import register


@register(
    name="core_space",
    title="Core space",
    summary="Use any other method at the cost of the adapters' rank, in a basis they share.",
    paper="Panariello et al. 2025, Accurate and efficient low-rank model merging in core space",
    url="https://arxiv.org/abs/2509.17786",
    low_rank=True,
    default_weight=inner_rule,
    by_factors=True,
    symmetric=False,
)
def core_space(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    inner: str = "ties",
    generator: torch.Generator | None = None,
    **options: Any,
) -> LoraFactors:
    """`U inner(M_1, ..., M_N) Vᵀ` with `M_i = Uᵀ ΔW_i V`, of size at most R = Σ r_i.

    U holds the left singular vectors of the stacked `[s_1 B_1 ... s_N B_N]`, V the right ones of
    the stacked A_i; they span every update, so `ΔW_i = U M_i Vᵀ` exactly and only the method
    `inner`, which gets all further options, changes anything. The bases are those of the factors as
    they are: an `inner` that works entry by entry, as TIES, gives another result where an update is
    split otherwise between A and B. O((d_in + d_out) R²) and the cost of `inner` on N matrices of
    size R.

    Raises:
        UnknownNameError: no method `inner`.
        MergeError: an option `inner` does not have, or one out of its range.

    Source: Panariello et al. 2025, arXiv 2509.17786.
    """
    merge = inner_method(inner, "core_space", generator, options)
    present, kept = nonzero(factors, weights)
    if not present:
        return zero_like(factors[0])
    core, lift = core_coordinates(present)
    return lift(merge(core, kept))
