"""A LoRA update kept as its two factors, and the algebra that never forms the dense update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import AdapterError
from orthomerge.moments import Moment

_LARGE = 2**30  # bytes that every machine has: below, nothing is asked


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """One layer's update `ΔW = scaling · B A` (Hu et al. 2021, arXiv 2106.09685).

    `A: [rank, d_in]`, `B: [d_out, rank]`; `scaling` is alpha/rank, or alpha/sqrt(rank) for rsLoRA.

    Raises:
        AdapterError: the two factors do not share a rank.
    """

    A: Float[Tensor, "rank d_in"]
    B: Float[Tensor, "d_out rank"]
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"A {list(self.A.shape)} and B {list(self.B.shape)} do not share a rank: "
                "A must be [rank, d_in] and B [d_out, rank]."
            )

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense update, (d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The dense update, `scaling · B A`. O(d_out · rank · d_in).

        Raises:
            AdapterError: an update larger than this machine's memory, which two small factors can
                stand for.
        """
        require_memory(self.shape, self.A.dtype)
        return self.scaling * (self.B @ self.A)

    def to(self, *args: Any, **kwargs: Any) -> LoraFactors:
        """Both factors moved or cast as by `Tensor.to`."""
        return LoraFactors(self.A.to(*args, **kwargs), self.B.to(*args, **kwargs), self.scaling)


def require_memory(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Refuse a dense update that cannot be held.

    Raises:
        AdapterError: it is larger than this machine's memory.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if size > _LARGE and size > psutil.virtual_memory().total:
        raise AdapterError(
            f"an update of {shape[0]:,} x {shape[1]:,} takes {size / 2**30:,.0f} GiB, more than "
            "this machine has: choose a method that keeps to the factors, or check where the "
            "adapter is from."
        )


def weighted_sum(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """The exact `Σ w_i ΔW_i` as one pair of factors of rank Σ r_i: rows stacked, columns stacked.

    Weights and scalings go into B, so the result has scaling 1. O(Σ r_i (d_in + d_out)).
    """
    A = torch.cat([f.A for f in factors], dim=0)
    B = torch.cat([f.B * (w * f.scaling) for f, w in zip(factors, weights, strict=True)], dim=1)
    return LoraFactors(A, B, 1.0)


def truncate(factors: LoraFactors, rank: int) -> LoraFactors:
    """The best approximation of rank at most `rank` (Eckart-Young), without the dense update.

    An SVD of a matrix of the factors' own rank R, in float64, between two bases: from the factors'
    Gram matrices, or from thin QRs where the factors are float64 themselves, since a Gram matrix
    keeps singular values to 1e-8 of the largest only. O((d_in + d_out) R² + R³). The singular
    values are shared evenly between A and B.
    """
    return truncate_measured(factors, rank)[0]


def truncate_measured(factors: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """`truncate`, and the share of the Frobenius norm that it lost, `‖ΔW - ΔW_k‖ / ‖ΔW‖`."""
    dtype = factors.A.dtype
    split = _by_qr if dtype == torch.float64 else _by_gram
    left, Rb = split(factors.B)
    right, Ra = split(factors.A.T)
    U, s, Vh = linalg.svd(factors.scaling * (Rb @ Ra.T), full_matrices=False)
    root = s[:rank].sqrt()
    B = left(U[:, :rank] * root)
    A = right(Vh[:rank].T * root).T
    norm = float(linalg.vector_norm(s))
    error = float(linalg.vector_norm(s[rank:])) / norm if norm else 0.0
    return LoraFactors(A.to(dtype), B.to(dtype), 1.0), error


_Lift = Callable[[Tensor], Tensor]


def _by_qr(matrix: Float[Tensor, "d r"]) -> tuple[_Lift, Float[Tensor, "r r"]]:
    """`X = Q R`: how to apply Q, and R."""
    Q, R = linalg.qr(matrix)
    return lambda small: Q @ small, R


def _by_gram(matrix: Float[Tensor, "d r"]) -> tuple[_Lift, Float[Tensor, "r r"]]:
    """`X = Q R` with `R = Λ^½ Vᵀ` of `XᵀX = V Λ Vᵀ`; `Q = X V Λ^-½` is never formed.

    Several times faster than a QR of a tall matrix; what lies below 1e-8 of it is lost.
    """
    wide = matrix.double()
    values, V = linalg.eigh(wide.T @ wide)
    least = values[-1:] * len(values) * torch.finfo(torch.float64).eps if len(values) else values
    root = torch.where(values > least, values, 0.0).clamp(min=0).sqrt()
    inverse = torch.where(root > 0, 1 / torch.where(root > 0, root, 1.0), 0.0)
    return lambda small: wide @ (V @ (inverse[:, None] * small)), root[:, None] * V.T


def from_dense(delta: Float[Tensor, "d_out d_in"], rank: int | None = None) -> LoraFactors:
    """Factors of a dense update, best of rank `rank` (all singular directions when None).

    O(d_out · d_in · min(d_out, d_in)), in float64.
    """
    U, s, Vh = linalg.svd(delta.double(), full_matrices=False)
    k = len(s) if rank is None else min(rank, len(s))
    root = s[:k].sqrt()
    return LoraFactors(
        (root[:, None] * Vh[:k]).to(delta.dtype), (U[:, :k] * root).to(delta.dtype), 1.0
    )


def inner(a: LoraFactors, b: LoraFactors) -> float:
    """Frobenius inner product `⟨ΔW_a, ΔW_b⟩` from r×r products, in float64."""
    left = b.B.double().T @ a.B.double()
    right = a.A.double() @ b.A.double().T
    return float(a.scaling * b.scaling * (left * right.T).sum())


def energy(factors: LoraFactors, moment: Moment) -> float:
    """Output energy of the update on features with second moment S: `tr(ΔW S ΔWᵀ)`, in float64.

    Only `A S Aᵀ` and `Bᵀ B`, both rank×rank, are formed. O(rank · d_in² + rank² · d_out).
    """
    B = factors.B.double()
    inner_energy = moment.quadratic(factors.A)
    return float(factors.scaling**2 * (inner_energy * (B.T @ B)).sum())
