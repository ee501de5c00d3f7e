"""The metric of tasks' inputs: second moments made positive, applied and solved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.moments import Moment


class Metric:
    """`M = Σ_t c_t (α S_t + (1-α) diag(S_t) + ρ_t I)`, symmetric positive definite, float64.

    `ρ_t` is `ridge` times the mean of S_t's diagonal, so that a direction no task's inputs have is
    counted alike for all. Where the S_t are held in few rows R, M is a diagonal plus `RᵀR` and
    solved by Woodbury's identity, O(k² d + k³) for k rows; otherwise by Cholesky, O(d³).
    """

    def __init__(
        self, moments: Sequence[Moment], shares: Sequence[float], *, alpha: float, ridge: float
    ) -> None:
        self._parts = [(m, c * alpha) for m, c in zip(moments, shares, strict=True)]
        diagonals = [c * _diagonal(m) for m, c in zip(moments, shares, strict=True)]
        self._diagonal = torch.stack(
            [(1 - alpha) * diagonal + ridge * diagonal.mean() for diagonal in diagonals]
        ).sum(dim=0)

    def apply(self, X: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """`X M`; M is not formed."""
        result = X * self._diagonal
        for moment, share in self._parts:
            result = result + share * moment.apply(X.T).T
        return result

    def solve(self, X: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """`X M⁻¹`; the solution of least norm where M is singular."""
        rows = self._few_rows()
        if rows is not None:
            return self._solve_rows(X, rows)
        matrix = torch.diag(self._diagonal)
        for moment, share in self._parts:
            matrix += share * moment.matrix
        L, info = linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return torch.cholesky_solve(X.T, L).T
        return X @ linalg.pinv(matrix, hermitian=True)

    def _few_rows(self) -> Float[Tensor, "k d"] | None:
        """`R` with `M = diagonal + RᵀR`, where there are fewer rows than columns."""
        factors = [moment.factor for moment, _ in self._parts]
        held = [rows for rows in factors if rows is not None]
        size = len(self._diagonal)
        if len(held) < len(factors) or sum(map(len, held)) >= size:
            return None
        if not bool((self._diagonal > 0).all()):
            return None
        scaled = zip(held, self._parts, strict=True)
        return torch.cat([share**0.5 * rows for rows, (_, share) in scaled])

    def _solve_rows(
        self, X: Float[Tensor, "k d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "k d"]:
        """Woodbury's identity on M scaled to a unit diagonal part."""
        root = self._diagonal.sqrt()
        scaled, Y = rows / root, X / root
        inner = torch.eye(len(scaled)).to(scaled) + scaled @ scaled.T
        L = linalg.cholesky(inner)
        return (Y - torch.cholesky_solve(scaled @ Y.T, L).T @ scaled) / root


def _diagonal(moment: Moment) -> Float[Tensor, " d"]:
    rows = moment.factor
    return moment.matrix.diagonal() if rows is None else rows.square().sum(dim=0)
