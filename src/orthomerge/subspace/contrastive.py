"""`contrastive`: silent on the others, still loud on its own task (beyond the paper)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment, RowMoment
from orthomerge.subspace._types import (
    Subspace,
    describe,
    gaussian_rows,
    orthonormal_rows,
    wide_and_whole,
)
from orthomerge.subspace.krylov import largest, shifted_cholesky
from orthomerge.subspace.registry import register
from orthomerge.subspace.row_space import factored


@register(
    "contrastive",
    title="most own energy per energy of the others: a generalised eigenproblem",
    paper="ours; the generalised Rayleigh quotient of common spatial patterns",
    needs_own=True,
)
def contrastive(
    other: Moment,
    rank: int,
    *,
    own: Moment | None = None,
    seed: int = 0,
    balance: float = 0.01,
) -> Subspace:
    """The span of the top eigenvectors of `S_own v = λ (S_other + ε I) v`, made orthonormal.

    `ε = balance · tr(S_other) / d_in`: a small `balance` insists on silence over the others, a
    large one turns towards the plain top directions of the own task. O(d_in³) for matrices,
    O((k_own + k_other)² d_in) for features of few rows.

    Raises:
        SubspaceError: no own statistics, a `balance` that is not positive, or a bad moment.
    """
    if own is None:
        raise SubspaceError(
            "the solver 'contrastive' needs the task's own statistics: pass own=, or --own."
        )
    if not balance > 0:
        raise SubspaceError(f"balance must be positive, not {balance}: 0.01 is the default.")
    mean_energy = other.trace / other.dim
    ridge = balance * (mean_energy if mean_energy > 0 else 1.0)
    few, mine = factored(other), factored(own)
    if few is not None and mine is not None:
        basis, how = _of_rows(few, mine, rank, seed, ridge), "gram"
    elif wide_and_whole(other):
        basis, how = _of_wide(other.matrix, own, rank, seed, ridge)
    else:
        values, vectors = torch.linalg.eigh(other.matrix)
        # Whiten by the inverse square root of S_other + εI: an ordinary eigenproblem remains.
        whiten = vectors / (values.clamp_min(0.0) + ridge).sqrt()
        _, directions = torch.linalg.eigh(own.quadratic(whiten.T))
        basis, how = (whiten @ directions[:, -rank:].flip(1)).T, "eigh"
    return describe(orthonormal_rows(basis), other, own, other.dim, how)


def _of_rows(
    few: Moment, mine: Moment, rank: int, seed: int, ridge: float
) -> Float[Tensor, "rank d_in"]:
    """By the Woodbury identity: `v = (RᵀR + εI)⁻¹ H_ownᵀ u`, u of an eigenproblem of own rows."""
    rows, own = few.factor, mine.factor
    assert rows is not None and own is not None
    gram = (few.gram if isinstance(few, RowMoment) else rows @ rows.T).clone()
    torch.diagonal(gram).add_(ridge)
    factor, _ = shifted_cholesky(gram, 0.0)
    cross = own @ rows.T
    inner = torch.cholesky_solve(cross.T, factor)
    whitened = own - inner.T @ rows
    _, directions = torch.linalg.eigh(whitened @ own.T)
    top = directions[:, -rank:].flip(1).T @ whitened
    if top.shape[0] < rank:  # fewer own rows than the rank: seeded rows the others do not reach
        drawn = gaussian_rows(rank - top.shape[0], few.dim, seed, rows)
        top = torch.cat([top, drawn - torch.cholesky_solve(rows @ drawn.T, factor).T @ rows])
    return top / top.norm(dim=1, keepdim=True)


def _of_wide(
    matrix: Tensor, own: Moment, rank: int, seed: int, ridge: float
) -> tuple[Float[Tensor, "rank d_in"], str]:
    """By one Cholesky factorisation `L Lᵀ = S_other + εI` and the top of `L⁻¹ S_own L⁻ᵀ`."""
    factor, _ = shifted_cholesky(matrix, ridge)

    def whitened(columns: Tensor) -> Tensor:
        wide = torch.linalg.solve_triangular(factor.T, columns, upper=True)
        return torch.linalg.solve_triangular(factor, own.apply(wide), upper=False)

    start = gaussian_rows(rank + 8, matrix.shape[0], seed, matrix).T
    found = largest(whitened, start, rank, tolerance=1e-9)
    if found is None:
        whole = torch.linalg.solve_triangular(factor, own.matrix, upper=False)
        whole = torch.linalg.solve_triangular(factor, whole.T, upper=False)
        top, how = torch.linalg.eigh(whole).eigenvectors[:, -rank:].flip(1), "eigh"
    else:
        top, how = found.vectors, f"cholesky, {found.steps} solves"
    return torch.linalg.solve_triangular(factor.T, top, upper=True).T, how
