"""`null_space`: rows that the other tasks' features do not reach at all."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError
from orthomerge.subspace._types import (
    Subspace,
    check_moment,
    describe,
    null_basis,
    random_rows_within,
)
from orthomerge.subspace.registry import register


@register(
    "null_space",
    title="inside the null space of the others' features, chosen by own energy or by seed",
    paper="Zhang & Zhou 2025, OSRM, arXiv 2505.22934 (few samples)",
)
def null_space(
    other: Float[Tensor, "d_in d_in"],
    rank: int,
    *,
    own: Float[Tensor, "d_in d_in"] | None = None,
    seed: int = 0,
    tie: str = "random",
    tolerance: float = 1e-10,
) -> Subspace:
    """Rows with `A H_otherᵀ = 0`, exact where `rank(S_other) ≤ d_in − rank`.

    The null space `N` of few features is far larger than `rank`; which rows of it to take is a
    choice made on purpose. `tie="random"` draws them by `seed`; `tie="own"` takes those of most
    own energy, the top eigenvectors of `Nᵀ S_own N`. `tolerance` is relative to the largest
    eigenvalue. O(d_in³).

    Raises:
        SubspaceError: fewer than `rank` admissible dimensions (the message says how many), or
            `tie="own"` without own statistics.
    """
    check_moment(other, rank, own)
    _, vectors, nullity = null_basis(other, tolerance)
    if nullity < rank:
        raise SubspaceError(
            f"rank {rank} is larger than the admissible subspace: the others' features leave "
            f"{nullity} of {other.shape[0]} dimensions free; lower the rank, take fewer samples "
            "or a coarser granularity, or use the solver 'min_eigen'."
        )
    free = vectors[:, :nullity]
    if tie == "random":
        basis = random_rows_within(free, rank, seed)
    elif tie == "own":
        if own is None:
            raise SubspaceError("tie 'own' needs the task's own statistics: pass own=, or --own.")
        _, directions = torch.linalg.eigh(free.T @ own.double() @ free)
        basis = (free @ directions[:, -rank:].flip(1)).T.contiguous()
    else:
        raise SubspaceError(f"unknown tie '{tie}': valid: random, own.")
    return describe(basis, other, own, nullity)


@register(
    "null_space_lapack",
    title="the last right singular vectors as LAPACK returns them: the published code's trap",
    paper="public code of arXiv 2505.22934, kept to measure what it does",
)
def null_space_lapack(
    other: Float[Tensor, "d_in d_in"],
    rank: int,
    *,
    own: Float[Tensor, "d_in d_in"] | None = None,
    seed: int = 0,
) -> Subspace:
    """The last `rank` rows of `Vᵀ` in `S_other = U Σ Vᵀ`, whatever they are.

    A comparison, not a recommendation: in the huge null space of a few mean vectors these rows are
    an arbitrary basis, and different tasks get nearly the same one. `seed` is ignored, as there.
    """
    check_moment(other, rank, own)
    values, vectors, nullity = null_basis(other)
    # Rows whose Gram matrix is S, then the full SVD of that short matrix, as the public code does
    # on its stack of means.
    kept = values[nullity:].clamp_min(0.0).sqrt()
    rows = (vectors[:, nullity:] * kept).T
    _, _, Vh = torch.linalg.svd(rows, full_matrices=True)
    return describe(Vh[-rank:].contiguous(), other, own, max(nullity, rank))
