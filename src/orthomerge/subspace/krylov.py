"""A few extreme eigenpairs of a large dense matrix, by block Krylov spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.subspace._types import gaussian_rows

Operator = Callable[[Tensor], Tensor]

# Columns beyond the wanted ones: they turn a cluster at the edge into one that lies inside.
_OVERSAMPLE = 8
_MAX_BLOCKS = 24


class Pairs(NamedTuple):
    """Eigenpairs, the wanted end first; `steps` is how often the operator was applied to a block,
    0 where a dense decomposition had to be used.
    """

    values: Float[Tensor, " rank"]
    vectors: Float[Tensor, "d_in rank"]
    steps: int


def largest(
    operator: Operator, start: Float[Tensor, "d_in block"], rank: int, *, tolerance: float
) -> Pairs | None:
    """The `rank` largest eigenpairs of a symmetric operator; None where they do not settle.

    Rayleigh-Ritz on the block Krylov space of `start`, orthogonalised twice (Golub & Underwood
    1977). Settled is a relative change of the sum of the wanted values below `tolerance` twice
    in a row. One application and O(d_in · block² · steps) a step.
    """
    basis = torch.linalg.qr(start).Q
    image = operator(basis)
    block, before, settled = basis, None, 0
    for step in range(1, _MAX_BLOCKS + 1):
        projected = basis.T @ image
        values, small = torch.linalg.eigh((projected + projected.T) / 2)
        top, turn = values[-rank:].flip(0), small[:, -rank:].flip(1)
        total = float(top.sum())
        settled = (
            settled + 1
            if before is not None and abs(total - before) <= tolerance * abs(total)
            else 0
        )
        if settled >= 2:
            return Pairs(top, basis @ turn, step)
        before = total
        if basis.shape[1] + block.shape[1] > basis.shape[0]:
            return None
        fresh = image[:, -block.shape[1] :]
        for _ in range(2):
            fresh = fresh - basis @ (basis.T @ fresh)
            fresh = torch.linalg.qr(fresh).Q
        block = fresh
        basis = torch.cat([basis, block], dim=1)
        image = torch.cat([image, operator(block)], dim=1)
    return None


def shifted_cholesky(
    matrix: Float[Tensor, "d_in d_in"], shift: float
) -> tuple[Float[Tensor, "d_in d_in"], float]:
    """The Cholesky factor of `S + σI` and the σ it took: from `shift` up by factors of 100.

    O(d_in³ / 3). A semi-definite matrix needs a shift of the size of its rounding.
    """
    diagonal = torch.diagonal(matrix)
    while True:
        shifted = matrix.clone()
        torch.diagonal(shifted).add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return factor, shift
        shift = max(shift * 100.0, float(diagonal.max()) * torch.finfo(torch.float64).eps)


def smallest(
    matrix: Float[Tensor, "d_in d_in"], rank: int, *, seed: int = 0, tolerance: float = 1e-9
) -> Pairs:
    """The `rank` smallest eigenpairs of a positive semi-definite matrix, ascending.

    One Cholesky factorisation of `S + σI`, σ of the size of rounding, and a few solves: the block
    Krylov space of the inverse. The seeded start decides which rows of an exact null space come
    out. Falls back to `torch.linalg.eigh` where it does not settle. O(d_in³ / 3) against the
    O(9 d_in³) of a full decomposition.
    """
    size = matrix.shape[0]
    eps = torch.finfo(torch.float64).eps
    factor, shift = shifted_cholesky(matrix, size * eps * float(torch.diagonal(matrix).mean()))
    start = gaussian_rows(rank + _OVERSAMPLE, size, seed, matrix).T

    def inverse(columns: Tensor) -> Tensor:
        return torch.cholesky_solve(columns, factor)

    found = largest(inverse, start, rank, tolerance=tolerance)
    if found is None:
        values, vectors = torch.linalg.eigh(matrix)
        return Pairs(values[:rank], vectors[:, :rank], 0)
    return Pairs(1.0 / found.values - shift, found.vectors, found.steps)
