"""`null_space`: rows that the other tasks' features do not reach at all."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError, unknown_name
from orthomerge.moments import Moment
from orthomerge.subspace._types import (
    Subspace,
    describe,
    gaussian_rows,
    null_basis,
    orthonormal_rows,
    random_rows_within,
    reached_of,
    top_rows_within,
)
from orthomerge.subspace.registry import register
from orthomerge.subspace.row_space import RowSpace, factored

TIES = ("random", "own")


@register(
    "null_space",
    title="inside the null space of the others' features, chosen by own energy or by seed",
    paper="Zhang & Zhou 2025, OSRM, arXiv 2505.22934 (few samples)",
)
def null_space(
    other: Moment,
    rank: int,
    *,
    own: Moment | None = None,
    seed: int = 0,
    tie: str = "random",
    tolerance: float = 1e-10,
) -> Subspace:
    """Rows with `A H_otherᵀ = 0`, exact where `rank(S_other) ≤ d_in − rank`.

    The null space of few features is far larger than `rank`; which rows of it to take is a choice
    made on purpose. `tie="random"` draws them by `seed`; `tie="own"` takes those of most own
    energy. `tolerance` is relative to the largest eigenvalue. O(k² d_in) for k rows of features,
    without any d_in × d_in matrix; O(d_in³) for a matrix.

    Raises:
        SubspaceError: fewer than `rank` admissible dimensions (the message says how many), or
            `tie="own"` without own statistics.
    """
    if tie not in TIES:
        raise unknown_name("tie", tie, TIES, error=SubspaceError)
    if tie == "own" and own is None:
        raise SubspaceError("tie 'own' needs the task's own statistics: pass own=, or --own.")
    few = factored(other)
    if few is not None:
        space = RowSpace(few, tolerance)
        _require_room(other.dim - space.dim, rank, other.dim)
        rows = outside(space, rank, other.dim, own, seed, tie)
        return describe(rows, other, own, other.dim - space.dim, "gram")
    _, vectors, nullity = null_basis(other.matrix, tolerance)
    _require_room(nullity, rank, other.dim)
    free = vectors[:, :nullity]
    if tie == "own" and own is not None:
        rows = top_rows_within(free, rank, own, seed)
    else:
        rows = random_rows_within(free, rank, seed)
    return describe(rows, other, own, nullity, "eigh")


def _require_room(nullity: int, rank: int, dim: int) -> None:
    if nullity < rank:
        raise SubspaceError(
            f"rank {rank} is larger than the admissible subspace: the others' features leave "
            f"{nullity} of {dim} dimensions free; lower the rank, take fewer samples "
            "or a coarser granularity, or use the solver 'min_eigen'."
        )


def outside(
    space: RowSpace, rank: int, dim: int, own: Moment | None, seed: int, tie: str
) -> Float[Tensor, "rank d_in"]:
    """Orthonormal rows outside a row space: drawn by `seed`, or of most own energy.

    Own energy outside is that of the own rows with the row space taken off: a Gram matrix as small
    as they are few. Where they reach fewer than `rank` dimensions, seeded rows fill up.
    """
    drawn = space.remove(gaussian_rows(rank, dim, seed, space.rows))
    if tie == "random" or own is None:
        return _settled(space, drawn)
    mine = own.factor
    if mine is None:
        everything = torch.linalg.eigh(space.rows.T @ space.rows).eigenvectors
        return top_rows_within(everything[:, : dim - space.dim], rank, own, seed)
    left = space.remove(mine)
    values, vectors = torch.linalg.eigh(left @ left.T)
    reached = reached_of(values[-rank:], own.trace)
    top = vectors[:, len(values) - reached :].flip(1).T @ left
    return _settled(space, torch.cat([top, drawn[: rank - reached]]))


def _settled(space: RowSpace, rows: Tensor) -> Tensor:
    # Making them orthonormal magnifies what rounding left of the row space: take it off once more.
    return orthonormal_rows(space.remove(orthonormal_rows(rows)))


@register(
    "null_space_lapack",
    title="the last right singular vectors as LAPACK returns them: the published code's trap",
    paper="public code of arXiv 2505.22934, kept to measure what it does",
)
def null_space_lapack(
    other: Moment,
    rank: int,
    *,
    own: Moment | None = None,
    seed: int = 0,
) -> Subspace:
    """The last `rank` rows of `Vᵀ` in `S_other = U Σ Vᵀ`, whatever they are.

    A comparison, not a recommendation: in the huge null space of a few mean vectors these rows are
    an arbitrary basis, and different tasks get nearly the same one. `seed` is ignored, as there.
    """
    values, vectors, nullity = null_basis(other.matrix)
    # Rows whose Gram matrix is S, then the full SVD of that short matrix, as the public code does
    # on its stack of means.
    kept = values[nullity:].clamp_min(0.0).sqrt()
    rows = (vectors[:, nullity:] * kept).T
    _, _, Vh = torch.linalg.svd(rows, full_matrices=True)
    return describe(Vh[-rank:].contiguous(), other, own, max(nullity, rank), "svd")
