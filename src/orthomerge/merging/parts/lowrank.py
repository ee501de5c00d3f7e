"""Singular bases of updates kept in factors: the dense update is never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.factors import (
    Lift,
    LoraFactors,
    from_dense,
    rank_for,
    thin_qr,
    thin_qrs,
    truncate_measured,
)
from orthomerge.subspace.krylov import largest

# Columns beyond the wanted ones, and how many times the whole they must fit into a side for a
# Krylov space to pay.
_OVERSAMPLE = 8
_SMALL_PART = 20
# Blocks that a Krylov space of many directions may grow to, and when it has grown enough: what a
# step still gains, as a part of what is lost, or of all where nothing is lost.
_STEPS = 6
_GAIN = 1e-3
_NOTHING = 1e-14
# A relative change of the squared singular values that moves their vectors by its root.
_SETTLED = 1e-10
# The gain in kept energy at which two shared subspaces have settled.
_SHARED = 1e-9
# How far rounding may turn a direction that is still taken for one.
_TURNED = 1e-3


def numerical_rank(
    values: Float[Tensor, " k"],
    size: int,
    dtype: torch.dtype,
    factors: Callable[[], Sequence[Float[Tensor, "rows columns"]]] | None = None,
) -> int:
    """How many singular values exceed `σ_max · size · eps(dtype)`; dtype is the data's own.

    Of `factors`, the matrices whose product was decomposed in float64, weaker ones count too where
    the columns of each, all made of length 1, are far from dependent: rounding them then turns the
    weakest direction no more than the strongest. They are asked for only where a value is that
    weak.

    Source: Demmel et al. 1999, Computing the singular value decomposition with high relative
    accuracy, doi 10.1016/S0024-3795(99)00134-2.
    """
    if not len(values):
        return 0
    least = values[0] * size * torch.finfo(dtype).eps
    kept = int((values > least).sum())
    if kept == len(values) or factors is None or dtype == torch.float64:
        return kept
    turned = torch.finfo(dtype).eps * math.prod(_dependence(m) for m in factors())
    if turned > _TURNED:
        return kept
    return int((values > values[0] * size * torch.finfo(torch.float64).eps).sum())


def _dependence(matrix: Float[Tensor, "rows columns"]) -> float:
    """The condition number of the columns made of length 1, zero ones left out; 1 at best."""
    wide = matrix.double()
    lengths = wide.square().sum(dim=0).sqrt()
    columns = wide[:, lengths > 0] / lengths[lengths > 0]
    if columns.shape[1] > columns.shape[0]:
        return math.inf
    values = linalg.svd(columns, full_matrices=False).S
    return float(values[0] / values[-1]) if len(values) else 1.0


@dataclass(frozen=True)
class Span:
    """Updates in orthonormal bases of all that they write and read: `ΔW_i = Q_B ΔW'_i Q_Aᵀ`.

    `factors` are those of the `ΔW'_i`, float64, no side longer than R = Σ r_i. What turns with its
    bases, as singular vectors do, is found there and lifted once. `like` is one of the updates, in
    whose dtype the result is.
    """

    factors: list[LoraFactors]
    left: Lift
    right: Lift
    like: LoraFactors

    def lift(self, update: LoraFactors) -> LoraFactors:
        """`Q_B ΔW' Q_Aᵀ`, as factors. O((d_in + d_out) R k) for rank k."""
        return LoraFactors(
            self.right(update.A.T).T.to(self.like.A),
            self.left(update.B).to(self.like.B),
            update.scaling,
        )


def span_of(factors: Sequence[LoraFactors]) -> Span:
    """The updates in their own span, by a thin QR of the stacked B and one of the stacked A.

    O((d_in + d_out) R²), R = Σ r_i.
    """
    stacked = torch.cat([f.A for f in factors]), torch.cat([f.B for f in factors], dim=1)
    (left, Rb), (right, Ra) = thin_qrs(LoraFactors(*stacked))
    ranks = [f.rank for f in factors]
    sides = zip(_columns(Ra, ranks), _columns(Rb, ranks), factors, strict=True)
    small = [LoraFactors(a.T, b, f.scaling) for a, b, f in sides]
    return Span(small, left, right, factors[0])


def _columns(matrix: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    return cast(Sequence[Tensor], matrix.split(list(counts), dim=1))


def thin_svd(
    factors: LoraFactors, like: LoraFactors | None = None
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, " k"], Float[Tensor, "k d_in"]]:
    """`ΔW = U diag(s) Vh` with the null directions left out, in float64.

    `like` has the dtype and the shape that the update comes from, by which a direction is null:
    those of `factors` by default. Thin QR of both factors, then an SVD of their rank:
    O((d_in + d_out) r² + r³).
    """
    like = like or factors
    (left, Rb), (right, Ra) = thin_qrs(factors)
    U, s, Vh = linalg.svd(factors.scaling * (Rb @ Ra.T), full_matrices=False)
    k = numerical_rank(s, max(like.shape), like.A.dtype, lambda: (Rb, Ra))
    return left(U[:, :k]), s[:k], right(Vh[:k].T).T


def truncate_dense(update: Float[Tensor, "d_out d_in"], rank: int) -> tuple[LoraFactors, float]:
    """The best approximation of rank at most `rank`, and the share of the norm it lost.

    Its few leading singular vectors by a block Krylov space of `ΔWᵀΔW`, in float64; a full SVD
    where they do not settle or are no small part: O(steps · rank · d_out d_in), at most
    O(d_out d_in min(d)).
    """
    wide = update.double()
    flat = wide if wide.shape[0] >= wide.shape[1] else wide.T
    block, size = rank + _OVERSAMPLE, flat.shape[1]
    norm = float(linalg.vector_norm(wide))
    found = None
    if _SMALL_PART * block <= size:
        g = torch.Generator().manual_seed(0)
        start = torch.randn(block, size, generator=g, dtype=torch.float64).to(wide.device)
        found = largest(lambda rows: (rows @ flat.T) @ flat, start, rank, tolerance=_SETTLED)
    if found is None:
        return _truncate_whole(update, rank)
    V = found.vectors
    image = flat @ V
    part = _balanced(found.values, image.T, V.T)
    if flat is not wide:
        part = LoraFactors(part.B.T, part.A.T, 1.0)
    lost = max(norm**2 - float(image.square().sum()), 0.0) ** 0.5
    return part.to(update.dtype), (lost / norm if norm else 0.0)


def truncate_to_energy(
    update: LoraFactors | Float[Tensor, "d_out d_in"], energy: float
) -> tuple[LoraFactors, float]:
    """The best approximation of the least rank that keeps `energy`, and the share of norm it lost.

    `energy` is a part of the squared Frobenius norm. Of a dense update all singular values must be
    known: those of its Gram matrix, in float64. O(d_out d_in min(d) + min(d)³).
    """
    if isinstance(update, LoraFactors):
        return truncate_measured(update, energy=energy)
    wide = update.double()
    flat = wide if wide.shape[0] >= wide.shape[1] else wide.T
    values, V = linalg.eigh(flat.T @ flat)
    values, V = values.flip(0).clamp(min=0), V.flip(1)
    rank = rank_for(values.sqrt(), energy, max(update.shape), update.dtype)
    V = V[:, :rank]
    part = _balanced(values[:rank], (flat @ V).T, V.T)
    if flat is not wide:
        part = LoraFactors(part.B.T, part.A.T, 1.0)
    total = float(values.sum())
    return part.to(update.dtype), ((float(values[rank:].sum()) / total) ** 0.5 if total else 0.0)


def truncate_nearly(
    update: Float[Tensor, "d_out d_in"], rank: int, factors: Sequence[LoraFactors]
) -> tuple[LoraFactors, float]:
    """Use for a rank as large as the adapters' together, where the best cut would take a full SVD.

    What is lost is within a part in a thousand of the least that any update of rank `rank` loses
    (in practice a part in ten thousand); the share of the norm that it is comes with it. A block
    Krylov space of `ΔWᵀΔW` from the adapters' rows of A, where most of their merge is (from the
    columns of B where d_out is smaller), in float64; it grows until a step gains less than a
    thousandth of what is lost. A full SVD where the space would be most of the whole.
    O(steps · rank · d_out d_in), some five steps.

    Source: Musco & Musco 2015, arXiv 1504.05477.
    """
    tall = update.shape[0] >= update.shape[1]
    start = torch.cat([f.A if tall else f.B.T for f in factors]).double()
    size = start.shape[1]
    if _STEPS * (max(rank, len(start)) + _OVERSAMPLE) > size:
        return _truncate_whole(update, rank)
    wide = update.double() if tall else update.double().T
    norm = float(wide.square().sum())
    g = torch.Generator().manual_seed(0)
    more = torch.randn(max(rank - len(start), 0) + _OVERSAMPLE, size, generator=g)
    fresh = _orthonormal(torch.cat([start, more.to(start)]))
    basis, image = fresh, fresh @ wide.T
    before = math.inf
    while True:
        values, turn = linalg.eigh(image @ image.T)
        lost = max(norm - float(values[-rank:].clamp(min=0).sum()), 0.0)
        settled = before - lost <= _GAIN * lost + norm * _NOTHING
        if settled or len(basis) + len(fresh) > size:
            break
        before = lost
        fresh = image[-len(fresh) :] @ wide
        for _ in range(2):
            fresh = _orthonormal(fresh - (fresh @ basis.T) @ basis)
        basis, image = torch.cat([basis, fresh]), torch.cat([image, fresh @ wide.T])
    turn = turn[:, -rank:].T
    part = _balanced(values[-rank:], turn @ image, turn @ basis)
    if not tall:
        part = LoraFactors(part.B.T, part.A.T, 1.0)
    return part.to(update.dtype), (lost / norm) ** 0.5 if norm else 0.0


def _orthonormal(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    return linalg.qr(rows.T).Q.T


def _balanced(
    values: Float[Tensor, " k"], image: Float[Tensor, "k d_out"], rows: Float[Tensor, "k d_in"]
) -> LoraFactors:
    """`Σ image_j rows_jᵀ` with `‖image_j‖² = values_j`, the singular values shared evenly."""
    root = values.clamp(min=0) ** 0.25
    inverse = torch.where(root > 0, 1 / torch.where(root > 0, root, 1.0), 0.0)
    return LoraFactors(rows * root[:, None], image.T * inverse, 1.0)


def _truncate_whole(update: Float[Tensor, "d_out d_in"], rank: int) -> tuple[LoraFactors, float]:
    """The best approximation and the share of the norm it lost, by a full SVD."""
    part, wide = from_dense(update, rank), update.double()
    norm = float(linalg.vector_norm(wide))
    lost = float(linalg.vector_norm(wide - part.to(torch.float64).delta()))
    return part, (lost / norm if norm else 0.0)


def shared_subspaces(
    updates: Sequence[tuple[Float[Tensor, "d_out k"], Float[Tensor, "d_in k"]]], rank: int
) -> tuple[Float[Tensor, "d_out r"], Float[Tensor, "d_in r"]]:
    """The left and the right subspace that together keep most of all updates `L_i R_iᵀ`.

    By turns each is the best for the other, until that gains less than 1e-9 of itself: a Tucker
    decomposition of the stacked updates in two modes (HOOI).

    Source: De Lathauwer et al. 2000, doi 10.1137/S0895479898346995.
    """
    V = shared_rows(updates, rank)
    before = -1.0
    while True:
        _, U = _dominant([left @ (right.T @ V) for left, right in updates], rank)
        found, V = _dominant([right @ (left.T @ U) for left, right in updates], rank)
        if found - before <= _SHARED * found:
            return U, V
        before = found


def shared_rows(
    updates: Sequence[tuple[Float[Tensor, "d_out k"], Float[Tensor, "d_in k"]]], rank: int
) -> Float[Tensor, "d_in r"]:
    """The right subspace that keeps most of all updates `L_i R_iᵀ`."""
    return _dominant([right @ linalg.qr(left).R.T for left, right in updates], rank)[1]


def _dominant(
    columns: Sequence[Float[Tensor, "d k"]], rank: int
) -> tuple[float, Float[Tensor, "d r"]]:
    """The squared norm that their leading left singular vectors keep of all columns, and these."""
    U, s, _ = linalg.svd(torch.cat(list(columns), dim=1), full_matrices=False)
    return float(s[:rank].square().sum()), U[:, :rank]


def column_basis(matrix: Float[Tensor, "d r"], dtype: torch.dtype) -> Float[Tensor, "d k"]:
    """The left singular vectors of the non-zero singular values of float64; dtype is the data's."""
    U, s, _ = linalg.svd(matrix, full_matrices=False)
    return U[:, : numerical_rank(s, max(matrix.shape), dtype, lambda: (matrix,))]


def polar(matrix: Float[Tensor, "d k"], dtype: torch.dtype) -> Float[Tensor, "d k"]:
    """The nearest matrix with orthonormal columns, `P Qᵀ` of `P S Qᵀ` (orthogonal Procrustes).

    Directions with no singular value (columns given twice) are left out, not completed at random.
    O(d k²).
    """
    left, R = thin_qr(matrix, dtype)
    P, s, Qh = linalg.svd(R, full_matrices=False)
    k = numerical_rank(s, max(matrix.shape), dtype)
    return left(P[:, :k] @ Qh[:k])


def nonzero(
    factors: Sequence[LoraFactors], weights: Sequence[float]
) -> tuple[list[LoraFactors], list[float]]:
    """The adapters whose update here is not zero for want of an A or a B, with their weights."""
    pairs = [
        (f, w) for f, w in zip(factors, weights, strict=True) if bool(f.A.any()) and bool(f.B.any())
    ]
    return [f for f, _ in pairs], [w for _, w in pairs]


def zero_like(factors: LoraFactors) -> LoraFactors:
    """The zero update of the same shape, of rank 1."""
    d_out, d_in = factors.shape
    return LoraFactors(factors.A.new_zeros(1, d_in), factors.B.new_zeros(d_out, 1))
