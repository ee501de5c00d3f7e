"""`contrastive`: low energy on the others, high energy on its own task (beyond the paper)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment
from orthomerge.subspace._types import (
    Subspace,
    describe,
    gaussian_rows,
    orthonormal_rows,
    reached_of,
    solve_rows,
    wide_and_whole,
)
from orthomerge.subspace.krylov import largest, shifted_cholesky
from orthomerge.subspace.registry import register
from orthomerge.subspace.row_space import factored


@register(
    "contrastive",
    title="most own energy per energy of the others: a generalised eigenproblem",
    paper="ours; the generalised Rayleigh quotient of common spatial patterns",
    needs_own=True,
)
def contrastive(
    other: Moment,
    rank: int,
    *,
    own: Moment | None = None,
    seed: int = 0,
    balance: float = 0.01,
) -> Subspace:
    """The span of the top eigenvectors of `S_own v = λ (S_other + ε I) v`, made orthonormal.

    `ε = balance · tr(S_other) / d_in`: a small `balance` insists on silence over the others, a
    large one turns towards the plain top directions of the own task. O(d_in³) for matrices,
    O((k_own + k_other)² d_in) for features of few rows.

    Raises:
        SubspaceError: no own statistics, a `balance` that is not positive, or a bad moment.
    """
    if own is None:
        raise SubspaceError(
            "the solver 'contrastive' needs the task's own statistics: pass own=, or --own."
        )
    if not balance > 0:
        raise SubspaceError(f"balance must be positive, not {balance}: 0.01 is the default.")
    basis, how = contrastive_rows(other, own, rank, seed, balance * mean_energy(other))
    return describe(basis, other, own, other.dim, how)


def mean_energy(other: Moment) -> float:
    """`tr(S) / d_in`; 1 where there is no energy at all, so that a part of it is a ridge."""
    return other.trace / other.dim or 1.0


def contrastive_rows(
    other: Moment, own: Moment, rank: int, seed: int, ridge: float
) -> tuple[Float[Tensor, "rank d_in"], str]:
    """Orthonormal rows that span the top of `S_own v = λ (S_other + εI) v`, and how they came.

    Where own features reach fewer than `rank` dimensions, rows `(S_other + εI)⁻¹ g` fill up, g
    drawn by `seed`: the others hardly reach them, and no library's choice shows.
    """
    few, mine = factored(other), factored(own)
    if few is not None and mine is not None:
        found = _of_rows(few, mine, rank, ridge)
    elif wide_and_whole(other):
        found = _of_wide(other.matrix, own, rank, seed, ridge)
    else:
        found = _of_matrix(other, own, rank, ridge)
    reached = reached_of(found.energies, own.trace)
    top = found.rows[:reached] / linalg.vector_norm(found.rows[:reached], dim=1, keepdim=True)
    if reached < rank:
        low = found.silence(gaussian_rows(rank - reached, other.dim, seed, top))
        top = torch.cat([top, low / linalg.vector_norm(low, dim=1, keepdim=True)])
    return orthonormal_rows(top), found.how


class _Found(NamedTuple):
    """Generalised eigenvectors, descending; `energies` are `ε λ`, at most `tr(S_own)`.

    `silence` is `ε (S_other + εI)⁻¹` on rows, up to a factor.
    """

    rows: Float[Tensor, "m d_in"]
    energies: Float[Tensor, " m"]
    silence: Callable[[Tensor], Tensor]
    how: str


def _of_rows(few: Moment, mine: Moment, rank: int, ridge: float) -> _Found:
    """By the Woodbury identity: `v = (RᵀR + εI)⁻¹ H_ownᵀ u`, u of an eigenproblem of own rows."""
    rows, own, gram = few.factor, mine.factor, few.gram
    assert rows is not None and own is not None and gram is not None
    ridged = gram.clone()
    torch.diagonal(ridged).add_(ridge)
    factor, _ = shifted_cholesky(ridged, 0.0)

    def silence(drawn: Tensor) -> Tensor:
        return drawn - solve_rows(factor, drawn @ rows.T) @ rows

    whitened = silence(own)
    values, directions = linalg.eigh(whitened @ own.T)
    top = directions[:, -rank:].flip(1).T @ whitened
    return _Found(top, values[-rank:].flip(0), silence, "gram")


def _of_matrix(other: Moment, own: Moment, rank: int, ridge: float) -> _Found:
    """By the inverse square root of `S_other + εI`: an ordinary eigenproblem remains."""
    values, vectors = other.eigh()
    whiten = vectors / (values.clamp_min(0.0) + ridge).sqrt()
    values, directions = linalg.eigh(own.quadratic(whiten.T))

    def silence(drawn: Tensor) -> Tensor:
        return (drawn @ whiten) @ whiten.T

    return _Found(
        (whiten @ directions[:, -rank:].flip(1)).T,
        values[-rank:].flip(0) * ridge,
        silence,
        "eigh",
    )


def _of_wide(matrix: Tensor, own: Moment, rank: int, seed: int, ridge: float) -> _Found:
    """By one Cholesky factorisation `L Lᵀ = S_other + εI` and the top of `L⁻¹ S_own L⁻ᵀ`."""
    factor, _ = shifted_cholesky(matrix, ridge)

    def whitened(rows: Tensor) -> Tensor:
        wide = linalg.solve_triangular(factor.T, rows.T, upper=True)
        return linalg.solve_triangular(factor, own.apply(wide), upper=False).T

    def silence(drawn: Tensor) -> Tensor:
        return solve_rows(factor, drawn)

    start = gaussian_rows(rank + 8, matrix.shape[0], seed, matrix)
    found = largest(whitened, start, rank, tolerance=1e-9)
    if found is None:
        whole = linalg.solve_triangular(factor, own.matrix, upper=False)
        whole = linalg.solve_triangular(factor, whole.T, upper=False)
        values, vectors = linalg.eigh(whole)
        top, energies, how = vectors[:, -rank:].flip(1), values[-rank:].flip(0), "eigh"
    else:
        top, energies, how = found.vectors, found.values, f"cholesky, {found.steps} solves"
    rows = linalg.solve_triangular(factor.T, top, upper=True).T
    return _Found(rows, energies * ridge, silence, how)
