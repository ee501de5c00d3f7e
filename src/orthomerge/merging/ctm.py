"""Compress then merge: any method on the r×r coordinates of the updates in shared subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from orthomerge import linalg
from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.inner import inner_method, inner_rule
from orthomerge.merging.parts.lowrank import nonzero, shared_subspaces, span_of, zero_like
from orthomerge.merging.parts.options import LayerProblem, check_fraction, check_rank
from orthomerge.merging.registry import Truncated, get_method, register


@register(
    name="ctm",
    title="Compress then merge",
    summary="Use when the merged adapter must be of one small rank and the method works entry by "
    "entry, as TIES: the rank is cut before the merge, not after it.",
    paper="He et al. 2026, Compress then merge: from multiple LoRAs into one low-rank adapter",
    url="https://arxiv.org/abs/2606.03723",
    low_rank=True,
    default_weight=inner_rule,
    symmetric=False,
)
def ctm(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    inner: str = "linear",
    rank: int | None = None,
    beta: float = 0.25,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Truncated:
    """`U inner(C_1, ..., C_N) Vᵀ` with `C_i = Uᵀ ΔW_i V`, r×r, in r-dimensional shared subspaces.

    U `[d_out, r]` and V `[d_in, r]` are orthonormal and keep most of `Σ c_i² ‖Uᵀ ΔW_i V‖²`, by
    turns the best for each other until that gains less than 1e-9 of itself (a Tucker decomposition
    of the stacked updates in two modes).
    `c_i = (β ‖ΔW_i‖ + (1 - β) mean_j ‖ΔW_j‖) / ‖ΔW_i‖`: at β = 1 an update counts by its size, at 0
    all count alike. r is the rank of the merge, by default the largest that went in. The error is
    what the subspaces lose, `√(1 - Σ ‖C_i‖² / Σ ‖ΔW_i‖²)`. `inner` gets all further options.
    O((d_in + d_out) R² + N R² r) per round, R = Σ r_i; no dense update is formed.

    Raises:
        UnknownNameError: no method `inner`.
        MergeError: an option `inner` does not have, one out of its range, or a density that keeps
            no entry of so few.

    Source: He et al. 2026, arXiv 2606.03723; the weights c_i are those of the authors' code.
    """
    merge = inner_method(inner, "ctm", generator, options)
    check_rank("rank", rank)
    check_fraction("beta", beta, zero=True)
    present, kept = nonzero(factors, weights)
    if not present:
        return Truncated(zero_like(factors[0]), 0.0)
    span = span_of(present)
    norms = [float(linalg.vector_norm(f.delta())) for f in span.factors]
    whole, mean = sum(n**2 for n in norms), sum(norms) / len(norms)
    if not whole:
        return Truncated(zero_like(factors[0]), 0.0)
    counted = [beta + (1 - beta) * mean / n if n else 0.0 for n in norms]
    sides = [(f.B * (f.scaling * c), f.A.T) for f, c in zip(span.factors, counted, strict=True)]
    U, V = shared_subspaces(sides, rank or max(f.rank for f in present))
    _check_density(inner, options, U.shape[1] * V.shape[1])
    core = [LoraFactors(f.A @ V, U.T @ f.B, f.scaling) for f in span.factors]
    merged = merge(core, kept)
    dense = merged.delta() if isinstance(merged, LoraFactors) else merged
    inside = sum(float(f.delta().square().sum()) for f in core)
    lost = max(1 - inside / whole, 0.0) ** 0.5
    return Truncated(span.lift(LoraFactors(V.T, U @ dense)), lost)


def _check_density(inner: str, options: Mapping[str, Any], entries: int) -> None:
    """Refuse a density that would leave nothing of the few coordinates."""
    density = options.get("density", get_method(inner).options.get("density"))
    if isinstance(density, int | float) and density * entries < 1:
        raise LayerProblem(
            f"the density {density:g} of '{inner}' keeps none of {entries} coordinates: raise it "
            "(--option density=0.5), or the rank."
        )
