"""A few extreme eigenpairs of a large dense matrix, by block Krylov spaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError
from orthomerge.subspace._types import gaussian_rows

Operator = Callable[[Tensor], Tensor]

# Columns beyond the wanted ones: they turn a cluster at the edge into one that lies inside.
_OVERSAMPLE = 8
_MAX_BLOCKS = 24
_ROUNDING = 64 * torch.finfo(torch.float64).eps


class Pairs(NamedTuple):
    """Eigenpairs, the wanted end first; `steps` is how often the operator was applied to a block,
    0 where a dense decomposition had to be used.
    """

    values: Float[Tensor, " rank"]
    vectors: Float[Tensor, "d_in rank"]
    steps: int


def largest(
    operator: Operator,
    start: Float[Tensor, "d_in block"],
    rank: int,
    *,
    tolerance: float,
    measure: Operator | None = None,
    floor: float = 0.0,
) -> Pairs | None:
    """The `rank` largest eigenpairs of a symmetric operator; None where they do not settle.

    Rayleigh-Ritz on the block Krylov space of `start`, orthogonalised twice (Golub & Underwood
    1977). Settled is a change of every wanted value below `tolerance` times itself, or below
    `floor` or rounding, twice in a row: their sum would hide the small ones. `measure` is the
    operator whose pairs are wanted where the space grows by another one (its inverse, say). One
    application of each and O(d_in · block² · steps) a step.
    """
    basis = torch.linalg.qr(start).Q
    grown = operator(basis)
    image = grown if measure is None else measure(basis)
    before: Tensor | None = None
    settled = 0
    for step in range(1, _MAX_BLOCKS + 1):
        projected = basis.T @ image
        values, small = torch.linalg.eigh((projected + projected.T) / 2)
        top, turn = values[-rank:].flip(0), small[:, -rank:].flip(1)
        if before is not None:
            rounding = max(floor, _ROUNDING * float(top.abs().max()))
            still = (top - before).abs() <= tolerance * top.abs() + rounding
            settled = settled + 1 if bool(still.all()) else 0
        if settled >= 2:
            return Pairs(top, basis @ turn, step)
        before = top
        if basis.shape[1] + grown.shape[1] > basis.shape[0]:
            return None
        fresh = grown
        for _ in range(2):
            fresh = fresh - basis @ (basis.T @ fresh)
            fresh = torch.linalg.qr(fresh).Q
        basis = torch.cat([basis, fresh], dim=1)
        grown = operator(fresh)
        image = torch.cat([image, grown if measure is None else measure(fresh)], dim=1)
    return None


def shifted_cholesky(
    matrix: Float[Tensor, "d_in d_in"], shift: float
) -> tuple[Float[Tensor, "d_in d_in"], float]:
    """The Cholesky factor of `S + σI` and the σ it took: from `shift` up by factors of 100.

    O(d_in³ / 3). A semi-definite matrix needs a shift of the size of its rounding.

    Raises:
        SubspaceError: a matrix that no shift of its own size makes definite.
    """
    # Nothing at all has no size of its own, and any shift serves.
    size = (float(torch.diagonal(matrix).abs().max()) if len(matrix) else 0.0) or 1.0
    while math.isfinite(size) and shift <= 1e4 * len(matrix) * size:
        shifted = matrix.clone()
        torch.diagonal(shifted).add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return factor, shift
        shift = max(shift * 100.0, size * torch.finfo(torch.float64).eps)
    raise SubspaceError("a second moment is not finite or far from symmetric: collect it again.")


def smallest(
    matrix: Float[Tensor, "d_in d_in"], rank: int, *, seed: int = 0, tolerance: float = 1e-9
) -> Pairs:
    """The `rank` smallest eigenpairs of a positive semi-definite matrix, ascending.

    One Cholesky factorisation of `S + σI`, σ of the size of rounding, and a few solves: the block
    Krylov space of the inverse, from which the pairs of `S` itself are taken, since beside an exact
    null space the inverse cannot tell the others apart. The seeded start decides which rows of that
    null space come out. Falls back to `torch.linalg.eigh` where it does not settle. O(d_in³ / 3)
    against the O(9 d_in³) of a full decomposition.
    """
    size = matrix.shape[0]
    eps = torch.finfo(torch.float64).eps
    factor, _ = shifted_cholesky(matrix, size * eps * float(torch.diagonal(matrix).mean()))
    start = gaussian_rows(rank + _OVERSAMPLE, size, seed, matrix).T

    def inverse(columns: Tensor) -> Tensor:
        return torch.cholesky_solve(columns, factor)

    def silence(columns: Tensor) -> Tensor:
        return -(matrix @ columns)

    floor = eps * float(torch.linalg.matrix_norm(matrix))
    found = largest(inverse, start, rank, tolerance=tolerance, measure=silence, floor=floor)
    if found is None:
        values, vectors = torch.linalg.eigh(matrix)
        return Pairs(values[:rank], vectors[:, :rank], 0)
    return Pairs(-found.values, found.vectors, found.steps)
