"""The row space of few features, and what is left outside it: no d_in × d_in matrix anywhere."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment
from orthomerge.subspace._types import (
    gaussian_rows,
    orthonormal_rows,
    reached_of,
    solve_rows,
    top_rows_within,
)

# A smallest pivot this far above the limit of what counts as zero shows full rank.
_CLEAR = 1e3


def independent(gram: Float[Tensor, "k k"], relative: float) -> Float[Tensor, "k k"] | None:
    """The Cholesky factor of `R Rᵀ`, where its pivots leave no doubt that the rows are independent.

    `relative` says which eigenvalues count as zero, as a part of the largest. O(k³ / 3).
    """
    lower, info = linalg.cholesky_ex(gram)
    pivots = torch.diagonal(lower).square()
    if not len(pivots) or int(info) != 0:
        return None
    limit = _CLEAR * max(relative, len(pivots) * torch.finfo(torch.float64).eps)
    return lower if bool(pivots.min() > limit * pivots.max()) else None


class RowSpace:
    """The span of the rows of a factored moment, `S = RᵀR`, through `R Rᵀ: [k, k]`.

    `relative` says which eigenvalues of `R Rᵀ` count as zero, as a part of the largest. O(k² d_in)
    for the Gram matrix unless the moment has it; then O(k³ / 3) where the rows are clearly
    independent, O(9 k³) where they are not.
    """

    def __init__(self, moment: Moment, relative: float) -> None:
        factor = moment.factor
        gram = moment.gram
        if factor is None or gram is None:
            raise SubspaceError("a row space needs a moment that holds rows, not a matrix.")
        self.rows, self._gram = factor, gram
        self._relative = relative
        self._lower = independent(self._gram, relative)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        values, vectors = linalg.eigh(self._gram)
        kept = values > self._relative * max(float(values[-1]) if len(values) else 0.0, 0.0)
        return values[kept], vectors[:, kept]

    @property
    def values(self) -> Float[Tensor, " dim"]:
        """The eigenvalues of `S` that do not count as zero, ascending. O(k³)."""
        return self._pairs[0]

    @property
    def dim(self) -> int:
        """Dimensions of the span."""
        return len(self.rows) if self._lower is not None else len(self.values)

    def remove(self, rows: Float[Tensor, "m d_in"], times: int = 2) -> Float[Tensor, "m d_in"]:
        """The part of `rows` that the features do not reach. O(m k d_in), twice for accuracy."""
        for _ in range(times):
            inside = rows @ self.rows.T
            if self._lower is not None:
                inside = solve_rows(self._lower, inside)
            else:
                values, vectors = self._pairs
                inside = ((inside @ vectors) / values) @ vectors.T
            rows = rows - inside @ self.rows
        return rows

    def basis(self) -> Float[Tensor, "dim d_in"]:
        """Orthonormal rows that span it, strongest last. O(k² d_in)."""
        values, vectors = self._pairs
        return (vectors / values.sqrt()).T @ self.rows


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
        everything = linalg.eigh(space.rows.T @ space.rows).eigenvectors
        return top_rows_within(everything[:, : dim - space.dim], rank, own, seed)
    left = space.remove(mine)
    values, vectors = linalg.eigh(left @ left.T)
    reached = reached_of(values[-rank:], own.trace)
    top = vectors[:, len(values) - reached :].flip(1).T @ left
    return _settled(space, torch.cat([top, drawn[: rank - reached]]))


def _settled(space: RowSpace, rows: Tensor) -> Tensor:
    # Making them orthonormal magnifies what rounding left of the row space: take it off once more.
    return orthonormal_rows(space.remove(orthonormal_rows(rows), times=1))


def factored(moment: Moment) -> Moment | None:
    """The moment, where it holds fewer rows than dimensions; else None."""
    factor = moment.factor
    return moment if factor is not None and factor.shape[0] < moment.dim else None
