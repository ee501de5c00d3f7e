"""`min_eigen`: the paper's start (OSRM, arXiv 2505.22934, section 3)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from orthomerge.subspace._types import (
    Subspace,
    check_moment,
    describe,
    null_basis,
    random_rows_within,
)
from orthomerge.subspace.registry import register


@register(
    "min_eigen",
    title="smallest eigenvectors of the others' second moment",
    paper="Zhang & Zhou 2025, OSRM, arXiv 2505.22934",
)
def min_eigen(
    other: Float[Tensor, "d_in d_in"],
    rank: int,
    *,
    own: Float[Tensor, "d_in d_in"] | None = None,
    seed: int = 0,
) -> Subspace:
    """The rows that see least of the other tasks: `min tr(A S_other Aᵀ)  s.t.  A Aᵀ = I`.

    By Ky Fan's theorem these are the eigenvectors of the `rank` smallest eigenvalues, whose sum is
    the captured energy. Where more than `rank` eigenvalues are zero every choice among them is
    optimal; the rows are then drawn from that null space by `seed`, never taken in the order of
    the linear algebra library (different tasks would get nearly the same rows). O(d_in³).

    Raises:
        SubspaceError: a moment that is not square or finite, or a rank outside 1..d_in.
    """
    check_moment(other, rank, own)
    _, vectors, nullity = null_basis(other)
    if nullity > rank:
        basis = random_rows_within(vectors[:, :nullity], rank, seed)
    else:
        basis = vectors[:, :rank].T.contiguous()
    return describe(basis, other, own, max(nullity, rank))
