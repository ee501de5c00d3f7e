"""The result every solver returns, what all refuse, and the one way a tie is broken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment

# Below this width a dense eigendecomposition is as fast as anything cleverer.
DENSE = 1024
# Energies below this part of the whole are rounding: the directions they belong to are arbitrary.
_SILENT = 1e-14


class Cost(NamedTuple):
    """What a solution took: wall `seconds`, and `how` it was computed."""

    seconds: float
    how: str


class Subspace(NamedTuple):
    """Orthonormal rows for `A`, and what they see of the features.

    `basis: [rank, d_in]`, float64, `basis @ basis.T = I`; `eigenvalues: [rank]` the energy
    `a_k S_other a_kᵀ` along each row; `captured_other` their sum, `tr(A S_other Aᵀ)`, and
    `captured_own` `tr(A S_own Aᵀ)`, None without own statistics; `total_other` and `total_own` the
    traces they are parts of; `admissible` the number of dimensions the rows were chosen from.
    `slack` is the energy a row may see beyond that, where the others' statistics are sketches
    (`Moment.slack`; None where samples bound nothing).
    """

    basis: Float[Tensor, "rank d_in"]
    eigenvalues: Float[Tensor, " rank"]
    captured_other: float
    captured_own: float | None
    total_other: float
    total_own: float | None
    admissible: int
    slack: float | None
    cost: Cost


def describe(
    basis: Float[Tensor, "rank d_in"],
    other: Moment,
    own: Moment | None,
    admissible: int,
    how: str,
) -> Subspace:
    """The `Subspace` of a given basis: energies measured, not assumed."""
    energies = other.energies(basis)
    return Subspace(
        basis=basis,
        eigenvalues=energies,
        captured_other=float(energies.sum()),
        captured_own=None if own is None else float(own.energies(basis).sum()),
        total_other=other.trace,
        total_own=None if own is None else own.trace,
        admissible=admissible,
        slack=other.slack,
        cost=Cost(0.0, how),
    )


def contrast(found: Iterable[Subspace]) -> float | None:
    """How much more the rows see of their own task than of the others, as parts of all there is.

    `(Σ tr(A S_own Aᵀ) / Σ tr(S_own)) / (Σ tr(A S_other Aᵀ) / Σ tr(S_other))`: 1 where nothing sets
    the task's features from the others'. None without own statistics, or where the rows see nothing
    of the others.
    """
    solved = list(found)
    own = [s for s in solved if s.captured_own is not None and s.total_own is not None]
    seen, mine = sum(s.captured_other for s in solved), sum(s.captured_own or 0.0 for s in own)
    total, whole = sum(s.total_other for s in solved), sum(s.total_own or 0.0 for s in own)
    if len(own) < len(solved) or not whole or not seen > _SILENT * total:
        return None
    return (mine / whole) / (seen / total)


def check_problem(other: Moment, rank: int, own: Moment | None) -> None:
    """Refuse what no solver can work on.

    Raises:
        SubspaceError: not finite, shapes or devices that differ, or a rank outside 1..d_in.
    """
    for name, moment in (("others'", other), ("own", own)):
        if moment is not None and not _finite(moment):
            raise SubspaceError(
                f"the {name} second moment holds NaN or infinity: collect it again."
            )
    if own is not None and own.dim != other.dim:
        raise SubspaceError(
            f"own second moment [{own.dim}, {own.dim}] and the others' [{other.dim}, {other.dim}] "
            "differ: both must come from the same layer of the same model."
        )
    if not 1 <= rank <= other.dim:
        raise SubspaceError(
            f"rank {rank} does not fit a layer with {other.dim} inputs: "
            f"choose a rank from 1 to {other.dim}."
        )
    if own is not None and _device(own) != _device(other):
        raise SubspaceError(
            f"own statistics lie on {_device(own)} and the others' on {_device(other)}: move them "
            "to one device with Moment.to."
        )


def _held(moment: Moment) -> Tensor:
    factor = moment.factor
    return moment.matrix if factor is None else factor


def _finite(moment: Moment) -> bool:
    # A sum over the entries is NaN or infinite where one of them is, and reads them once.
    return bool(torch.isfinite(_held(moment).sum()))


def _device(moment: Moment) -> torch.device:
    return _held(moment).device


def wide_and_whole(other: Moment) -> bool:
    """Whether a moment, once it is a matrix, is too wide for `eigh` to be the best way."""
    return other.dim > DENSE


def null_basis(
    moment: Moment, relative: float | None = None
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"], int]:
    """Ascending eigenpairs of a second moment and the dimension of its numerical null space.

    An eigenvalue counts as zero at or below `relative · λ_max`; by default `d_in · eps(float64)`,
    the rounding of the eigensolver itself. O(d_in³).
    """
    values, vectors = moment.eigh()
    if relative is None:
        relative = len(values) * torch.finfo(torch.float64).eps
    floor = relative * max(float(values[-1]), 0.0)
    return values, vectors, int((values <= floor).sum())


def gaussian_rows(rank: int, dim: int, seed: int, like: Tensor) -> Float[Tensor, "rank d_in"]:
    """A seeded float64 Gaussian, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, dim, generator=generator, dtype=torch.float64).to(like.device)


def random_rows_within(
    vectors: Float[Tensor, "d_in k"], rank: int, seed: int
) -> Float[Tensor, "rank d_in"]:
    """`rank` orthonormal rows drawn uniformly from the span of orthonormal columns.

    A seeded Gaussian is projected onto the span, so the rows depend on the span and the seed only,
    never on the basis that the linear algebra library happened to return for it.
    """
    gaussian = gaussian_rows(rank, vectors.shape[0], seed, vectors)
    return orthonormal_rows((gaussian @ vectors) @ vectors.T)


def top_rows_within(
    vectors: Float[Tensor, "d_in k"], rank: int, own: Moment, seed: int
) -> Float[Tensor, "rank d_in"]:
    """The `rank` orthonormal rows of most own energy in the span of orthonormal columns.

    Where own features reach fewer dimensions of it, rows drawn by `seed` fill up.
    """
    values, directions = linalg.eigh(own.quadratic(vectors.T))
    reached = reached_of(values[-rank:], own.trace)
    top = (vectors @ directions[:, len(values) - reached :].flip(1)).T
    if reached == rank:
        return top.contiguous()
    drawn = random_rows_within(vectors, rank, seed)[: rank - reached]
    return orthonormal_rows(torch.cat([top, drawn]))


def reached_of(values: Float[Tensor, " n"], scale: float) -> int:
    """How many of some energies, each at most `scale`, are more than rounding."""
    return int((values > _SILENT * scale).sum())


def orthonormal_rows(rows: Float[Tensor, "rank d_in"]) -> Float[Tensor, "rank d_in"]:
    """Rows with the same span and `R Rᵀ = I`; signs fixed so that QR's choice does not show."""
    Q, R = linalg.qr(rows.T)
    signs = torch.sign(torch.diagonal(R))
    signs[signs == 0] = 1.0
    return (Q * signs).T.contiguous()


def solve_rows(factor: Float[Tensor, "d d"], rows: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """`X (L Lᵀ)⁻¹` by two triangular solves: `torch.cholesky_solve` copies the factor each time."""
    half = linalg.solve_triangular(factor, rows.T, upper=False)
    return linalg.solve_triangular(factor.T, half, upper=True).T
