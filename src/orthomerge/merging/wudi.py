"""WUDI: the update that interferes least on the adapters' own row spaces, without data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge import linalg
from orthomerge.factors import LoraFactors, inner
from orthomerge.merging.parts.lowrank import column_basis, nonzero, zero_like
from orthomerge.merging.parts.options import check_number, check_positive
from orthomerge.merging.registry import register


@register(
    name="wudi",
    title="WUDI",
    summary="Use without data: the adapters' own rows stand in for their tasks' inputs.",
    paper="Cheng et al. 2025, Whoever started the interference should end it",
    url="https://arxiv.org/abs/2503.08099",
    low_rank=True,
    default_weight="1/√N",
)
def wudi(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    ridge: float = 1e-2,
    lambda_: float = 1.0,
) -> LoraFactors:
    """`λ · argmin_τ Σ_i ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖² + ρ ‖τ - Σ τ_i‖²` with `τ_i = w_i ΔW_i`.

    The rows of an update span the inputs it was trained on, so its own Gram matrix takes the place
    of the data. The paper descends on this loss from the sum with Adam for a set number of steps;
    it is quadratic, so here it is solved: ρ, `ridge` times the mean eigenvalue of the loss's
    matrix, takes the part of stopping early, and pulls to the sum where the rows say nothing.
    Solved in the row space alone, of size R = Σ r_i: O((d_in + d_out) R² + R³).

    Raises:
        MergeError: an option value out of its range.

    Source: Cheng et al. 2025, arXiv 2503.08099, equation 10.
    """
    check_positive("ridge", ridge)
    check_number("lambda_", lambda_)
    present, kept = nonzero(factors, weights)
    pairs = [(f, w) for f, w in zip(present, kept, strict=True) if w != 0]
    if not pairs:
        return zero_like(factors[0])
    V = column_basis(torch.cat([f.A for f, _ in pairs]).T)
    rows = [(w * f.scaling) * f.B.double() @ (f.A.double() @ V) for f, w in pairs]
    norms = [w * w * inner(f, f) for f, w in pairs]
    grams = [row.T @ row / norm for row, norm in zip(rows, norms, strict=True)]
    gram = torch.stack(grams).sum(dim=0)
    rho = ridge * float(gram.diagonal().mean())
    eye = torch.eye(len(gram)).to(gram)
    target = torch.stack([row @ g for row, g in zip(rows, grams, strict=True)]).sum(dim=0)
    target = target + rho * torch.stack(rows).sum(dim=0)
    solved = linalg.solve(gram + rho * eye, target, left=False)
    return LoraFactors(V.T.to(factors[0].A), solved.to(factors[0].B), lambda_)
