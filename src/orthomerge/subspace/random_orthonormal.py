"""`random_orthonormal`: the control, with the same row norm and no knowledge of any task."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.subspace._types import Subspace, check_moment, describe, orthonormal_rows
from orthomerge.subspace.registry import register


@register(
    "random_orthonormal",
    title="random orthonormal rows: the control of every comparison",
    paper="control",
)
def random_orthonormal(
    other: Float[Tensor, "d_in d_in"],
    rank: int,
    *,
    own: Float[Tensor, "d_in d_in"] | None = None,
    seed: int = 0,
) -> Subspace:
    """Orthonormal rows drawn uniformly (Haar) by `seed`; the statistics serve only to measure.

    O(rank² d_in).

    Raises:
        SubspaceError: a moment that is not square or finite, or a rank outside 1..d_in.
    """
    check_moment(other, rank, own)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, other.shape[0], generator=generator, dtype=torch.float64)
    basis = orthonormal_rows(rows.to(other.device))
    return describe(basis, other, own, other.shape[0])
