"""The metric of a task's inputs: a second moment made positive, applied and solved."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.moments import Moment


class Metric:
    """`M = Σ_t c_t (α S_t + (1-α) diag(S_t) + ρ_t I)`, symmetric positive definite, float64.

    `ρ_t` is `ridge` times the mean of S_t's diagonal, so that a direction no task's inputs have is
    counted alike for all. Where the S_t are held in few rows R and α < 1 or ridge > 0, M is a
    diagonal plus `RᵀR` and solved by Woodbury's identity, O(k² d + k³) for k rows; otherwise by
    Cholesky, O(d³).
    """

    def __init__(
        self, moments: list[Moment], shares: list[float], *, alpha: float, ridge: float
    ) -> None:
        self._diagonal = torch.zeros(moments[0].dim, dtype=torch.float64)
        self._rows: Tensor | None = None
        self._matrix: Tensor | None = None
        factors: list[Tensor] = []
        matrices: list[Tensor] = []
        for moment, share in zip(moments, shares, strict=True):
            rows = moment.factor
            diagonal = (
                moment.matrix.diagonal() if rows is None else rows.square().sum(dim=0)
            ).double()
            self._diagonal = self._diagonal.to(diagonal) + share * (
                (1 - alpha) * diagonal + ridge * diagonal.mean()
            )
            if rows is None:
                matrices.append(share * alpha * moment.matrix)
            else:
                factors.append((share * alpha) ** 0.5 * rows)
        count = sum(len(rows) for rows in factors)
        few = not matrices and count < moments[0].dim and bool((self._diagonal > 0).all())
        if few:
            self._rows = torch.cat(factors)
        else:
            total = torch.diag(self._diagonal)
            for matrix in matrices:
                total += matrix
            for rows in factors:
                total += rows.T @ rows
            self._matrix = total

    def apply(self, X: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """`X M`."""
        if self._matrix is not None:
            return X @ self._matrix
        assert self._rows is not None
        return X * self._diagonal + (X @ self._rows.T) @ self._rows

    def solve(self, X: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """`X M⁻¹`; the solution of least norm where M is singular."""
        if self._matrix is not None:
            L, info = torch.linalg.cholesky_ex(self._matrix)
            if int(info) == 0:
                return torch.cholesky_solve(X.T, L).T
            return X @ torch.linalg.pinv(self._matrix, hermitian=True)
        assert self._rows is not None
        root = self._diagonal.sqrt()
        scaled = self._rows / root
        Y = X / root
        inner = torch.eye(len(scaled)).to(scaled) + scaled @ scaled.T
        L = torch.linalg.cholesky(inner)
        Y = Y - torch.cholesky_solve(scaled @ Y.T, L).T @ scaled
        return Y / root
