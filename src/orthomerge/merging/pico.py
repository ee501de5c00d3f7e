"""Pico: weaken the output directions that all adapters crowd into, merge, restore the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from orthomerge import linalg
from orthomerge.factors import LoraFactors
from orthomerge.factors import inner as inner_product
from orthomerge.merging.parts.inner import inner_method
from orthomerge.merging.parts.lowrank import nonzero, zero_like
from orthomerge.merging.parts.space import scale
from orthomerge.merging.registry import Update, register


@register(
    name="pico",
    title="Pico",
    summary="Use when the adapters write into the same output directions, before any other method.",
    paper="Tang & Yang 2026, Crowded in B-space",
    url="https://arxiv.org/abs/2604.16826",
    symmetric=False,
    low_rank=True,
    default_weight="1/N",
    by_factors=True,
)
def pico(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    inner: str = "linear",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Update:
    """`γ inner(C ΔW_1, ..., C ΔW_N; w)`, C the calibration of the shared directions of B.

    With `[s_1 B_1 ... s_N B_N] = U diag(σ) Vᵀ` and `p_j = σ_j² / Σ σ²`, C scales direction u_j by
    `1 / (1 + (N-1) p_j)` and leaves the rest; `γ = Σ |w_i| ‖ΔW_i‖ / ‖inner(...)‖` restores the size
    (the paper's at w = 1/N). `inner` is any method that takes the adapters alone and gets all
    further options. O((d_in + d_out) R² + R³) and the cost of `inner`, R = Σ r_i.

    Raises:
        UnknownNameError: no method `inner`.
        MergeError: an option `inner` does not have, or one out of its range.

    Source: Tang & Yang 2026, arXiv 2604.16826.
    """
    merge = inner_method(inner, "pico", generator, options)
    present, kept = nonzero(factors, weights)
    if not present:
        return zero_like(factors[0])
    stacked = torch.cat([f.scaling * f.B.double() for f in present], dim=1)
    U, s, _ = linalg.svd(stacked, full_matrices=False)
    share = s.square() / s.square().sum()
    drop = 1 - 1 / (1 + (len(present) - 1) * share)
    calibrated: list[LoraFactors] = []
    for f in present:
        B = f.B.double()
        calibrated.append(LoraFactors(f.A, (B - (U * drop) @ (U.T @ B)).to(f.B), f.scaling))
    merged = merge(calibrated, kept)
    wanted = sum(abs(w) * _norm(f) for f, w in zip(present, kept, strict=True))
    size = _norm(merged)
    return scale(merged, wanted / size) if size else merged


def _norm(update: Update) -> float:
    if isinstance(update, LoraFactors):
        return math.sqrt(max(inner_product(update, update), 0.0))
    return float(linalg.vector_norm(update.double()))
