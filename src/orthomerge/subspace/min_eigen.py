"""`min_eigen`: the paper's start (OSRM, arXiv 2505.22934, section 3)."""

from __future__ import annotations

from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment
from orthomerge.subspace._types import (
    Subspace,
    describe,
    null_basis,
    orthonormal_rows,
    random_rows_within,
    top_rows_within,
    wide_and_whole,
)
from orthomerge.subspace.krylov import smallest
from orthomerge.subspace.registry import register
from orthomerge.subspace.row_space import RowSpace, factored, outside

_ZERO = 1e-12


@register(
    "min_eigen",
    title="smallest eigenvectors of the others' second moment",
    paper="Zhang & Zhou 2025, OSRM, arXiv 2505.22934",
)
def min_eigen(
    other: Moment,
    rank: int,
    *,
    own: Moment | None = None,
    seed: int = 0,
    floor: float = 0.0,
) -> Subspace:
    """The rows that see least of the other tasks: `min tr(A S_other Aᵀ)  s.t.  A Aᵀ = I`.

    By Ky Fan's theorem these are the eigenvectors of the `rank` smallest eigenvalues, whose sum is
    the captured energy. Where more than `rank` eigenvalues are zero every choice among them is
    optimal; the rows are then drawn from that null space by `seed`, never taken in the order of
    the linear algebra library (different tasks would get nearly the same rows).

    `floor` (beyond the paper) counts every direction with less than `floor` times the mean energy
    of the others as empty, and chooses among the empty ones those of most own energy, so that a
    direction that no task ever uses is not mistaken for a good one.

    O(k² d_in) for k rows of features, O(d_in³) for a matrix.

    Raises:
        SubspaceError: a moment that is not finite, a rank outside 1..d_in, a negative floor, or a
            floor without own statistics.
    """
    if floor < 0:
        raise SubspaceError(f"floor must not be negative, not {floor}: 0 is the paper's start.")
    if floor and own is None:
        raise SubspaceError("a floor needs the task's own statistics: pass own=, or --own.")
    few = factored(other)
    if few is not None and not floor:
        space = RowSpace(few, _ZERO)
        if other.dim - space.dim >= rank:
            rows = outside(space, rank, other.dim, own, seed, "random")
            return describe(rows, other, own, other.dim - space.dim, "gram")
    if wide_and_whole(other) and not floor:
        found = smallest(other.matrix, rank, seed=seed)
        how = f"cholesky, {found.steps} solves" if found.steps else "eigh"
        return describe(orthonormal_rows(found.vectors.T), other, own, rank, how)
    values, vectors, nullity = null_basis(other)
    if floor and own is not None:
        empty = max(int((values <= floor * other.trace / other.dim).sum()), rank)
        rows = top_rows_within(vectors[:, :empty], rank, own, seed)
        return describe(rows, other, own, empty, "eigh")
    if nullity > rank:
        rows = random_rows_within(vectors[:, :nullity], rank, seed)
    else:
        rows = vectors[:, :rank].T.contiguous()
    return describe(rows, other, own, max(nullity, rank), "eigh")
