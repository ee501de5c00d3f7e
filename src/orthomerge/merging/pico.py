"""Pico: weaken the output directions that all adapters crowd into, merge, restore the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

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
    stacked = torch.cat([f.B for f in present], dim=1).double()
    scalings = stacked.new_tensor([f.scaling for f in present for _ in range(f.rank)])
    values, V = linalg.eigh((stacked.T @ stacked) * scalings * scalings[:, None])
    share = values.clamp(min=0) / values.clamp(min=0).sum()
    drop = 1 - 1 / (1 + (len(present) - 1) * share)
    # U diag(drop) Uᵀ X = X V diag(drop) Vᵀ for X = U diag(σ) Vᵀ: U is not needed.
    weaker = (scalings[:, None] * V * drop) @ (V.T * torch.where(scalings != 0, 1 / scalings, 0.0))
    whole = (stacked - stacked @ weaker).to(present[0].B)
    columns = cast(Sequence[Tensor], whole.split([f.rank for f in present], dim=1))
    calibrated = [LoraFactors(f.A, B, f.scaling) for f, B in zip(present, columns, strict=True)]
    merged = merge(calibrated, kept)
    wanted = sum(abs(w) * _norm(f) for f, w in zip(present, kept, strict=True))
    size = _norm(merged)
    return scale(merged, wanted / size) if size else merged


def _norm(update: Update) -> float:
    if isinstance(update, LoraFactors):
        return math.sqrt(max(inner_product(update, update), 0.0))
    return float(linalg.vector_norm(update.double()))
