"""A few extreme eigenpairs of a large dense matrix, without its full decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import SubspaceError
from orthomerge.subspace._types import gaussian_rows, orthonormal_rows, solve_rows

Operator = Callable[[Tensor], Tensor]

# Columns beyond the wanted ones: they turn a cluster at the edge into one inside.
_OVERSAMPLE = 8
_MAX_BLOCKS = 40
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
    start: Float[Tensor, "block d_in"],
    rank: int,
    *,
    tolerance: float,
    precondition: Operator | None = None,
    floor: float = 0.0,
) -> Pairs | None:
    """The `rank` largest eigenpairs of a symmetric operator on rows; None if they do not settle.

    Block Davidson (Davidson 1975; Sleijpen & van der Vorst 1996): Rayleigh-Ritz on a space that
    grows by the preconditioned residuals of the leading block, orthogonalised twice. Without
    `precondition` it is the block Krylov space. An inexact `precondition` costs steps, never
    accuracy: values come from `operator` alone. Settled is a change of every wanted value below
    `tolerance` times itself, or below `floor` or rounding, twice in a row: their sum would hide
    the small ones. One application of each and O(d_in · block² · steps) per step.
    """
    block, size = start.shape
    most = min(_MAX_BLOCKS * block, size - size % block)
    basis, image = start.new_empty(most, size), start.new_empty(most, size)
    projected = start.new_zeros(most, most)
    fresh = orthonormal_rows(start)
    before: Tensor | None = None
    settled = 0
    for end in range(block, most + 1, block):
        new = slice(end - block, end)
        basis[new], image[new] = fresh, operator(fresh)
        projected[:end, new] = basis[:end] @ image[new].T
        projected[new, :end] = projected[:end, new].T
        values, small = linalg.eigh(projected[:end, :end])
        values, turn = values[-block:].flip(0), small[:, -block:].flip(1).T
        top = values[:rank]
        if before is not None:
            rounding = max(floor, _ROUNDING * float(top.abs().max()))
            still = (top - before).abs() <= tolerance * top.abs() + rounding
            settled = settled + 1 if bool(still.all()) else 0
        if settled >= 2:
            return Pairs(top, (turn[:rank] @ basis[:end]).T, end // block)
        before = top
        fresh = turn @ image[:end] - values[:, None] * (turn @ basis[:end])
        if precondition is not None:
            fresh = precondition(fresh)
        for _ in range(2):
            fresh = orthonormal_rows(fresh - (fresh @ basis[:end].T) @ basis[:end])
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
        factor, info = linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return factor, shift
        shift = max(shift * 100.0, size * torch.finfo(torch.float64).eps)
    raise SubspaceError("a second moment is not finite or far from symmetric: collect it again.")


def smallest(
    matrix: Float[Tensor, "d_in d_in"], rank: int, *, seed: int = 0, tolerance: float = 1e-6
) -> Pairs:
    """The `rank` smallest eigenpairs of a positive semi-definite matrix, ascending.

    One Cholesky factorisation, in float32 where the matrix is definite enough for it, whose solves
    precondition the residuals of `S` itself in float64. The seeded start decides which rows of an
    exact null space come out. Falls back to a float64 factor, then to `torch.linalg.eigh`, where
    the values do not settle. A value that last moved by `tolerance` is right to far better, since
    each step gains about a digit. O(d_in³ / 3) against the O(9 d_in³) of a full decomposition.
    """
    size = matrix.shape[0]
    floor = torch.finfo(torch.float64).eps * float(linalg.matrix_norm(matrix))
    start = gaussian_rows(rank + _OVERSAMPLE, size, seed, matrix)

    def silence(rows: Tensor) -> Tensor:
        return -(rows @ matrix)

    for inverse in (_rough_inverse(matrix), _fine_inverse(matrix)):
        if inverse is None:
            continue
        found = largest(
            silence, start, rank, tolerance=tolerance, precondition=inverse(), floor=floor
        )
        if found is not None:
            return Pairs(-found.values, found.vectors, found.steps)
    values, vectors = linalg.eigh(matrix)
    return Pairs(values[:rank], vectors[:, :rank], 0)


def _rough_inverse(matrix: Tensor) -> Callable[[], Operator] | None:
    """Solves by a float32 factor of the matrix scaled to a unit diagonal, if that is definite.

    The scaling takes out what single features of large energy do to the condition.
    """
    diagonal = torch.diagonal(matrix)
    if not bool((diagonal > 0).all()):
        return None
    scale = diagonal.rsqrt()
    rough = matrix.float()
    rough.mul_(scale.float()[:, None]).mul_(scale.float())
    factor, info = linalg.cholesky_ex(rough)
    if int(info) != 0:
        return None

    def solve(rows: Tensor) -> Tensor:
        # Residuals are tiny by then; float32 cannot hold the small ones unless they are scaled.
        size = linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-300)
        return solve_rows(factor, (rows / size * scale).float()).double() * scale * size

    return lambda: solve


def _fine_inverse(matrix: Tensor) -> Callable[[], Operator]:
    """Solves by a float64 factor of `S + σI`, σ of the size of rounding; made when it is needed."""

    def make() -> Operator:
        shift = len(matrix) * torch.finfo(torch.float64).eps * float(torch.diagonal(matrix).mean())
        factor, _ = shifted_cholesky(matrix, shift)
        return lambda rows: solve_rows(factor, rows)

    return make
