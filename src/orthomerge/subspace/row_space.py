"""The row space of few features, and what is left outside it: no d_in × d_in matrix anywhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment, RowMoment


class RowSpace:
    """The span of the rows of a factored moment, `S = RᵀR`, through `R Rᵀ: [k, k]`.

    `relative` says which eigenvalues of `R Rᵀ` count as zero, as a part of the largest. O(k² d_in)
    for the Gram matrix unless the moment has it, O(k³) for the rest.
    """

    def __init__(self, moment: Moment, relative: float) -> None:
        factor = moment.factor
        if factor is None:
            raise SubspaceError("a row space needs a moment that holds rows, not a matrix.")
        self.rows = factor
        gram = moment.gram if isinstance(moment, RowMoment) else factor @ factor.T
        values, vectors = torch.linalg.eigh(gram)
        kept = values > relative * max(float(values[-1]) if len(values) else 0.0, 0.0)
        self.values = values[kept]
        self._vectors = vectors[:, kept]
        self.dim = int(kept.sum())

    def remove(self, rows: Float[Tensor, "m d_in"]) -> Float[Tensor, "m d_in"]:
        """The part of `rows` that the features do not reach. O(m k d_in), twice for accuracy."""
        for _ in range(2):
            inside = (rows @ self.rows.T) @ self._vectors
            rows = rows - ((inside / self.values) @ self._vectors.T) @ self.rows
        return rows

    def basis(self) -> Float[Tensor, "dim d_in"]:
        """Orthonormal rows that span it, strongest last. O(k² d_in)."""
        return (self._vectors / self.values.sqrt()).T @ self.rows


def factored(moment: Moment) -> Moment | None:
    """The moment, where it holds fewer rows than dimensions; else None."""
    factor = moment.factor
    return moment if factor is not None and factor.shape[0] < moment.dim else None
