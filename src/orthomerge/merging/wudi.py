"""WUDI: the update that interferes least on the adapters' own row spaces, without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.merging.parts.lowrank import column_basis, nonzero, span_of, zero_like
from orthomerge.merging.parts.options import check_number, check_positive, check_rank
from orthomerge.merging.registry import Update, register


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
    ridge: float = 0.3,
    lambda_: float = 1.0,
    steps: int | None = None,
    learning_rate: float = 1e-5,
) -> Update:
    """`λ · argmin_τ Σ_i ‖(τ - τ_i) τ_iᵀ‖² / ‖τ_i‖² + ρ ‖τ - Σ τ_i‖²` with `τ_i = w_i ΔW_i`.

    The rows of an update span the inputs it was trained on, so its own Gram matrix takes the place
    of the data. The loss is quadratic, so it is solved, in the row space alone, of size
    R = Σ r_i; ρ, `ridge` times the mean eigenvalue of the loss's matrix, pulls to the sum where the
    rows say little. Adapters that share an initialization of A have rows that differ little, and a
    small ridge then doubles the norm of the sum and more.

    This is the published loss and not the published result: the authors start at the sum and take
    300 steps of Adam with a rate of 1e-5 (2e-5 for language models), which ends long before the
    minimum and depends on the size of the updates. `steps=300` does that; ρ is then 0 and the
    result dense. O((d_in + d_out) R² + R³), or O(steps · R d_out d_in).

    Raises:
        MergeError: an option value out of its range.

    Source: Cheng et al. 2025, arXiv 2503.08099, equation 10, and its code.
    """
    check_positive("ridge", ridge)
    check_number("lambda_", lambda_)
    check_rank("steps", steps)
    if steps is not None and steps > _MOST:
        raise MergeError(f"option 'steps' must be at most {_MOST}, not {steps}: 300 is published.")
    check_positive("learning_rate", learning_rate)
    present, kept = nonzero(factors, weights)
    pairs = [(f, w) for f, w in zip(present, kept, strict=True) if w != 0]
    if not pairs:
        return zero_like(factors[0])
    span = span_of([f for f, _ in pairs])
    small = list(zip(span.factors, (w for _, w in pairs), strict=True))
    V = column_basis(torch.cat([f.A for f, _ in small]).T, span.like.A.dtype)
    rows = [(w * f.scaling) * f.B @ (f.A @ V) for f, w in small]
    grams = [row.T @ row / row.square().sum() for row in rows]
    gram = torch.stack(grams).sum(dim=0)
    target = torch.stack([row @ g for row, g in zip(rows, grams, strict=True)]).sum(dim=0)
    if steps is not None:
        start = weighted_sum(*zip(*pairs, strict=True)).delta()
        far = span.right(V), gram, span.left(target)
        return lambda_ * _descended(start, *far, steps, learning_rate)
    rho = ridge * float(gram.diagonal().mean())
    eye = torch.eye(len(gram)).to(gram)
    target = target + rho * torch.stack(rows).sum(dim=0)
    solved = linalg.solve(gram + rho * eye, target, left=False)
    return span.lift(LoraFactors(V.T, solved, lambda_))


_MOST = 100_000


def _descended(
    start: Float[Tensor, "d_out d_in"],
    V: Float[Tensor, "d_in k"],
    gram: Float[Tensor, "k k"],
    target: Float[Tensor, "d_out k"],
    steps: int,
    learning_rate: float,
) -> Float[Tensor, "d_out d_in"]:
    """Adam on the loss, its gradient `2 (τ V G - T) Vᵀ` with `G = Σ G_i`, `T = Σ τ_i V G_i`."""
    G, T, V = gram.to(start), target.to(start), V.to(start)
    merged = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        with torch.no_grad():
            merged.grad = 2 * ((merged @ V) @ G - T) @ V.T
        cast(None, adam.step())
    return merged.detach()
