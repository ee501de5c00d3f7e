"""`null_space`: rows that the other tasks' features do not reach at all."""

from __future__ import annotations

import torch

from orthomerge import linalg
from orthomerge.errors import SubspaceError, unknown_name
from orthomerge.moments import Moment
from orthomerge.subspace._types import (
    Subspace,
    describe,
    null_basis,
    random_rows_within,
    top_rows_within,
)
from orthomerge.subspace.registry import register
from orthomerge.subspace.row_space import RowSpace, factored, outside

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
    _, vectors, nullity = null_basis(other, tolerance)
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
    of: str = "rows",
) -> Subspace:
    """The last `rank` rows of `Vᵀ` in `X = U Σ Vᵀ`, X the rows of the others, whatever they are.

    A comparison, not a recommendation: in the huge null space of a few mean vectors these rows are
    an arbitrary basis, and different tasks get nearly the same one. With granularity "task_mean" X
    is what the public code decomposes: one mean per other task, in the order given, on which the
    basis depends. Its means count padding; ours do not. `of="moment"`, and a moment that holds no
    rows, make X of the eigenvectors of `S_other` instead. `seed` is ignored, as there. O(d_in³).

    Raises:
        SubspaceError: `of` is neither "rows" nor "moment".
    """
    if of not in ("rows", "moment"):
        raise unknown_name("of", of, ("rows", "moment"), error=SubspaceError)
    rows = other.factor if of == "rows" else None
    if rows is None:
        values, vectors, nullity = null_basis(other)
        rows = (vectors[:, nullity:] * values[nullity:].sqrt()).T
    _, values, Vh = linalg.svd(rows, full_matrices=True)
    floor = other.dim * torch.finfo(values.dtype).eps
    nullity = other.dim - int((values > floor * values.sum()).sum())
    return describe(Vh[-rank:].contiguous(), other, own, max(nullity, rank), "svd")
