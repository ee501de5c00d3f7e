"""`random_orthonormal`: the control, with the same row norm and no knowledge of any task."""

from __future__ import annotations

import torch

from orthomerge.moments import Moment
from orthomerge.subspace._types import Subspace, describe, gaussian_rows, orthonormal_rows
from orthomerge.subspace.registry import register


@register(
    "random_orthonormal",
    title="random orthonormal rows: the control of every comparison",
    paper="control",
)
def random_orthonormal(
    other: Moment,
    rank: int,
    *,
    own: Moment | None = None,
    seed: int = 0,
) -> Subspace:
    """Orthonormal rows drawn uniformly (Haar) by `seed`; the statistics serve only to measure.

    O(rank² d_in).

    Raises:
        SubspaceError: a moment that is not finite, or a rank outside 1..d_in.
    """
    factor = other.factor
    like: torch.Tensor = other.matrix if factor is None else factor
    basis = orthonormal_rows(gaussian_rows(rank, other.dim, seed, like))
    return describe(basis, other, own, other.dim, "qr")
