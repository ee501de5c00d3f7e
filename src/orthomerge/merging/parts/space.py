"""Where a method works: on the dense updates, on A and B apart, or in a basis adapters share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.factors import LoraFactors, require_memory, thin_qr
from orthomerge.merging.parts.lowrank import (
    column_basis,
    nonzero,
    numerical_rank,
    span_of,
    zero_like,
)
from orthomerge.merging.parts.options import LayerProblem
from orthomerge.merging.registry import Update

SPACES = ("delta", "factors", "knots", "core")

Combine = Callable[[Float[Tensor, "n rows columns"], Float[Tensor, " n"]], Tensor]


def combine_in(
    space: str, factors: Sequence[LoraFactors], weights: Sequence[float], combine: Combine
) -> Update:
    """Apply `combine(stacked updates, weights)` in the space asked for.

    - "delta": on the dense updates `ΔW_i = s_i B_i A_i`: what the papers define. O(N d_out d_in).
    - "factors": on the A_i with weights `sign(w_i s_i) √|w_i s_i|` and on the B_i with
      `√|w_i s_i|`, as PEFT's `add_weighted_adapter` does. The product of the two results has cross
      terms `B_i A_j`, i ≠ j, that belong to no adapter: O(N r (d_in + d_out)), an approximation.
    - "knots": on the `Σ V_iᵀ` of `[ΔW_1 ... ΔW_N] = U Σ [V_1ᵀ ... V_Nᵀ]`, one basis U of outputs
      for all (Stoica et al. 2025, arXiv 2410.19735). O((d_out + N d_in) R²), R = Σ r_i.
    - "core": on the `M_i = Uᵀ ΔW_i V`, of size at most R, in a basis shared on both sides
      (Panariello et al. 2025, arXiv 2509.17786). O((d_in + d_out) R² + N R²).

    The last two represent every update exactly and return factors; a linear `combine` gives the
    same sum in them as in "delta".

    Raises:
        LayerProblem: "factors" and the ranks differ (an absent layer has any rank).
    """
    if space == "delta":
        deltas = dense_updates(factors)
        return combine(deltas, deltas.new_tensor(weights))
    if space == "factors":
        return _combine_factors(factors, weights, combine)
    present, kept = nonzero(factors, weights)
    if not present:
        return zero_like(factors[0])
    if space == "knots":
        U, rows = knots_coordinates(present)
        merged = combine(rows, rows.new_tensor(kept))
        return LoraFactors(merged.to(factors[0].A), U.to(factors[0].B), 1.0)
    cores, lift = core_coordinates(present)
    core = torch.stack([f.delta() for f in cores])
    return lift(combine(core, core.new_tensor(kept)))


def dense_updates(factors: Sequence[LoraFactors]) -> Float[Tensor, "n d_out d_in"]:
    """The updates `s_i B_i A_i` in one tensor, each written once. O(N r d_out d_in).

    Raises:
        AdapterError: one is larger than this machine's memory.
    """
    first = factors[0]
    require_memory(first.shape, first.A.dtype)
    deltas = first.A.new_empty(len(factors), *first.shape)
    for delta, f in zip(deltas, factors, strict=True):
        torch.mm(f.scaling * f.B, f.A, out=delta)
    return deltas


def _combine_factors(
    factors: Sequence[LoraFactors], weights: Sequence[float], combine: Combine
) -> LoraFactors:
    A, B = stacked_factors(factors, "space 'factors'", "use space 'delta'")
    both = A.new_tensor([w * f.scaling for f, w in zip(factors, weights, strict=True)])
    root = both.abs().sqrt()
    signed = torch.where(both >= 0, root, -root)
    return LoraFactors(combine(A, signed), combine(B, root), 1.0)


def stacked_factors(
    factors: Sequence[LoraFactors], what: str, way: str
) -> tuple[Float[Tensor, "n r d_in"], Float[Tensor, "n d_out r"]]:
    """The A_i and the B_i of one rank, each in one tensor; an absent layer is zero of that rank.

    `what` needs that, and `way` is the way out, in the error's words.

    Raises:
        LayerProblem: the ranks differ.
    """
    ranks = sorted({f.rank for f in factors if f.rank})
    if len(ranks) > 1:
        raise LayerProblem(f"{what} needs equal ranks, not {', '.join(map(str, ranks))}: {way}.")
    rank = ranks[0] if ranks else 0
    A = torch.stack([f.A if f.rank else f.A.new_zeros(rank, f.A.shape[1]) for f in factors])
    B = torch.stack([f.B if f.rank else f.B.new_zeros(f.B.shape[0], rank) for f in factors])
    return A, B


def knots_coordinates(
    factors: Sequence[LoraFactors],
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, "n k d_in"]]:
    """U and the `Σ V_iᵀ` of the joint SVD `[ΔW_1 ... ΔW_N] = U Σ [V_1ᵀ ... V_Nᵀ]`.

    With thin QRs `[s_1 B_1 ...] = Q [R_1 ...]` and `A_iᵀ = Q_i L_i` the concatenation is
    `Q [R_1 L_1ᵀ ... R_N L_Nᵀ] blockdiag(Q_iᵀ)`, so its SVD is that of one matrix of size R, in
    float64: neither the dense updates nor their concatenation is formed.
    O(d_out R² + N d_in r R + R³).
    """
    left, R = thin_qr(torch.cat([f.scaling * f.B for f in factors], dim=1))
    parts = cast(Sequence[Tensor], R.split([f.rank for f in factors], dim=1))
    L = [thin_qr(f.A.T)[1] for f in factors]
    small = torch.cat([r @ one.T for r, one in zip(parts, L, strict=True)], dim=1)
    P, s, _ = linalg.svd(small, full_matrices=False)
    like = factors[0]
    size, dtype = max(like.shape), like.A.dtype
    P = P[:, : numerical_rank(s, size, dtype, lambda: (R, cast(Tensor, torch.block_diag(*L))))]
    rows = like.A.new_empty(len(factors), P.shape[1], like.shape[1])
    for row, r, f in zip(rows, parts, factors, strict=True):
        torch.mm((P.T @ r).to(f.A), f.A, out=row)
    return left(P), rows


def core_coordinates(
    factors: Sequence[LoraFactors],
) -> tuple[list[LoraFactors], Callable[[Update], LoraFactors]]:
    """Every update as `M_i = Uᵀ ΔW_i V`, in float64 factors, and what makes factors of `U M Vᵀ`.

    U and V are the singular vectors of the stacked `s_i B_i` and of the stacked A_i. They depend on
    how an update is split between A and B, but not on where its scaling stands: as in the authors'
    code it is a part of B. O((d_in + d_out) R² + R³), R = Σ r_i.
    """
    span = span_of(factors)
    dtype = span.like.A.dtype
    U = column_basis(torch.cat([f.scaling * f.B for f in span.factors], dim=1), dtype)
    V = column_basis(torch.cat([f.A for f in span.factors]).T, dtype)
    core = [LoraFactors(f.A @ V, U.T @ f.B, f.scaling) for f in span.factors]

    def lift(merged: Update) -> LoraFactors:
        if isinstance(merged, LoraFactors):
            return span.lift(LoraFactors(merged.A @ V.T, U @ merged.B, merged.scaling))
        return span.lift(LoraFactors(V.T, U @ merged))

    return core, lift


def scale(update: Update, by: float) -> Update:
    """The update times a number."""
    if isinstance(update, LoraFactors):
        return LoraFactors(update.A, update.B, update.scaling * by)
    return update * by
