"""The result every solver returns, and the one way a tie is broken."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError


class Subspace(NamedTuple):
    """Orthonormal rows for `A`, and what they see of the features.

    `basis: [rank, d_in]`, float64, `basis @ basis.T = I`; `eigenvalues: [rank]` the energy
    `a_k S_other a_kᵀ` along each row; `captured_other` their sum, `tr(A S_other Aᵀ)`;
    `captured_own` is `tr(A S_own Aᵀ)`, None without own statistics; `admissible` the number of
    dimensions the rows were chosen from.
    """

    basis: Float[Tensor, "rank d_in"]
    eigenvalues: Float[Tensor, " rank"]
    captured_other: float
    captured_own: float | None
    admissible: int


def describe(
    basis: Float[Tensor, "rank d_in"],
    other: Float[Tensor, "d_in d_in"],
    own: Float[Tensor, "d_in d_in"] | None,
    admissible: int,
) -> Subspace:
    """The `Subspace` of a given basis: energies measured, not assumed."""
    energies = ((basis @ other.double()) * basis).sum(dim=1)
    own_energy = None
    if own is not None:
        own_energy = float(((basis @ own.double()) * basis).sum())
    return Subspace(basis, energies, float(energies.sum()), own_energy, admissible)


def check_moment(other: Tensor, rank: int, own: Tensor | None) -> None:
    """Refuse what no solver can work on.

    Raises:
        SubspaceError: not square, not finite, shapes that differ, or a rank outside 1..d_in.
    """
    if other.ndim != 2 or other.shape[0] != other.shape[1]:
        raise SubspaceError(
            f"a second moment is square [d_in, d_in], this one is {list(other.shape)}: "
            "pass H.T @ H / n, not the rows H."
        )
    if not bool(torch.isfinite(other).all()):
        raise SubspaceError("the others' second moment holds NaN or infinity: collect it again.")
    if own is not None and own.shape != other.shape:
        raise SubspaceError(
            f"own second moment {list(own.shape)} and the others' {list(other.shape)} differ: "
            "both must come from the same layer of the same model."
        )
    if not 1 <= rank <= other.shape[0]:
        raise SubspaceError(
            f"rank {rank} does not fit a layer with {other.shape[0]} inputs: "
            f"choose a rank from 1 to {other.shape[0]}."
        )


def null_basis(
    moment: Float[Tensor, "d_in d_in"], relative: float | None = None
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"], int]:
    """Ascending eigenpairs of a second moment and the dimension of its numerical null space.

    An eigenvalue counts as zero at or below `relative · λ_max`; by default `d_in · eps(float64)`,
    the rounding of the eigensolver itself. O(d_in³).
    """
    values, vectors = torch.linalg.eigh(moment.double())
    if relative is None:
        relative = len(values) * torch.finfo(torch.float64).eps
    floor = relative * max(float(values[-1]), 0.0)
    return values, vectors, int((values <= floor).sum())


def random_rows_within(
    vectors: Float[Tensor, "d_in k"], rank: int, seed: int
) -> Float[Tensor, "rank d_in"]:
    """`rank` orthonormal rows drawn uniformly from the span of orthonormal columns.

    A seeded Gaussian is projected onto the span, so the rows depend on the span and the seed only,
    never on the basis that the linear algebra library happened to return for it.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(rank, vectors.shape[0], generator=generator, dtype=torch.float64).to(
        vectors.device
    )
    return orthonormal_rows((gaussian @ vectors) @ vectors.T)


def orthonormal_rows(rows: Float[Tensor, "rank d_in"]) -> Float[Tensor, "rank d_in"]:
    """Rows with the same span and `R Rᵀ = I`; signs fixed so that QR's choice does not show."""
    Q, R = torch.linalg.qr(rows.T)
    signs = torch.sign(torch.diagonal(R))
    signs[signs == 0] = 1.0
    return (Q * signs).T.contiguous()
