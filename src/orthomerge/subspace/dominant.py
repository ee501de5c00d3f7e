"""The directions where features have most energy: what a projected `A` stays out of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment
from orthomerge.subspace._types import orthonormal_rows
from orthomerge.subspace.row_space import RowSpace, factored


def dominant_directions(
    moment: Moment, *, share: float = 0.99, most: int | None = None
) -> Float[Tensor, "k d_in"]:
    """The fewest orthonormal rows that hold `share` of the energy, strongest first, at most `most`.

    Outside of them all unit directions together see at most `1 − share` of `tr(S)`, unless `most`
    cut the list. O(d_in³), or O(k² d_in) for features of k rows.

    Raises:
        SubspaceError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise SubspaceError(f"share {share} is not in (0, 1]: 0.99 leaves 1 % of the energy.")
    few = factored(moment)
    if few is not None:
        space = RowSpace(few, 1e-14)
        values, rows = space.values.flip(0), space.basis().flip(0)
    else:
        ascending, vectors = moment.eigh()
        values, rows = ascending.flip(0).clamp_min(0.0), vectors.flip(1).T
    held = torch.cumsum(values, dim=0)
    total = float(held[-1]) if len(held) else 0.0
    if total <= 0:
        return rows[:0]
    count = int((held < share * total * (1 - 1e-12)).sum()) + 1
    count = min(count, len(values), most if most is not None else len(values))
    return orthonormal_rows(rows[:count])


def project_rows_out(
    rows: Float[Tensor, "r d_in"], directions: Float[Tensor, "k d_in"]
) -> Float[Tensor, "r d_in"]:
    """`A (I − P)` with `P = DᵀD`. O(r k d_in)."""
    return rows - (rows @ directions.T) @ directions
