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


def truncate_measured(
    factors: LoraFactors, rank: int = 1, *, energy: float | None = None
) -> tuple[LoraFactors, float]:
    """`truncate`, and the share of the Frobenius norm that it lost, `‖ΔW - ΔW_k‖ / ‖ΔW‖`.

    With an `energy` the rank is the least that keeps this part of the squared norm.
    """
    dtype = factors.A.dtype
    (left, Rb), (right, Ra) = (thin_qr(m, weak=False) for m in (factors.B, factors.A.T))
    U, s, Vh = linalg.svd(factors.scaling * (Rb @ Ra.T), full_matrices=False)
    if energy is not None:
        rank = rank_for(s, energy, max(factors.shape), dtype)
    root = s[:rank].sqrt()
    B = left(U[:, :rank] * root)
    A = right(Vh[:rank].T * root).T
    norm = float(linalg.vector_norm(s))
    error = float(linalg.vector_norm(s[rank:])) / norm if norm else 0.0
    return LoraFactors(A.to(dtype), B.to(dtype), 1.0), error


def rank_for(values: Float[Tensor, " k"], energy: float, size: int, dtype: torch.dtype) -> int:
    """The least rank, 1 at least, that keeps a part `energy` of the sum of squares of the values.

    `values` are singular, largest first, of a matrix whose longer side is `size`; what the rounding
    of `dtype`, the data's own, may have added is not asked for.
    """
    lost = values.double().square().flip(0).cumsum(0).flip(0)
    spare = max(1 - energy, size * torch.finfo(dtype).eps ** 2)
    return max(int((lost > spare * lost[:1]).sum()), 1)


Lift = Callable[[Tensor], Tensor]
"""Applies the Q of `X = Q R` to columns."""

# The condition number of columns of length 1 up to which a Gram matrix is taken, and the least
# length beside the largest: what it costs, 1e-16 of the square of the one and of one over the
# other, is then less than the rounding of float32.
_FAR_FROM_DEPENDENT = 1e4
_SHORT = 1e-7


def thin_qr(
    matrix: Float[Tensor, "d r"], dtype: torch.dtype | None = None, *, weak: bool = True
) -> tuple[Lift, Float[Tensor, "k r"]]:
    """`X = Q R` in float64: how to apply Q, which is not formed where it need not be, and R.

    From the Gram matrix of the columns, made of length 1, where they are far from dependent and
    `dtype`, the data's own, is not float64: several times faster than Householder's QR, which does
    the rest. Without `weak`, what is below 1e-8 of the largest may be lost, and only float64
    takes a QR. O(d r²).
    """
    return _by_gram(matrix, dtype or matrix.dtype, weak) or _by_householder(matrix)


def thin_qrs(factors: LoraFactors) -> tuple[tuple[Lift, Tensor], tuple[Lift, Tensor]]:
    """`thin_qr` of B and of `Aᵀ`, both by QR where one has to be: their product is as exact."""
    B, A = (_by_gram(m, m.dtype, True) for m in (factors.B, factors.A.T))
    if B is None or A is None:
        return _by_householder(factors.B), _by_householder(factors.A.T)
    return B, A


def _by_householder(matrix: Float[Tensor, "d r"]) -> tuple[Lift, Float[Tensor, "k r"]]:
    Q, R = linalg.qr(matrix.double())
    return lambda small: Q @ small, R


def _by_gram(
    matrix: Float[Tensor, "d r"], dtype: torch.dtype, weak: bool
) -> tuple[Lift, Float[Tensor, "r r"]] | None:
    """None where a Gram matrix would cost what the data hold."""
    if dtype == torch.float64 or not 0 < matrix.shape[1] <= matrix.shape[0]:
        return None
    wide = matrix.double()
    gram = wide.T @ wide
    found = _cholesky(gram) or (None if weak else _eigen(gram))
    if found is None:
        return None
    R, inverse = found
    return lambda small: wide @ (inverse @ small), R


def _cholesky(
    gram: Float[Tensor, "r r"],
) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r r"]] | None:
    """R and its inverse with `RᵀR` the Gram matrix; None where columns are near to dependent."""
    lengths = gram.diagonal().sqrt()
    if not bool(lengths.min() > _SHORT * lengths.max()):
        return None
    L, info = linalg.cholesky_ex(gram / lengths / lengths[:, None])
    if int(info):
        return None
    inverse = linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=False)
    if not float(linalg.vector_norm(L) * linalg.vector_norm(inverse)) < _FAR_FROM_DEPENDENT:
        return None
    return L.T * lengths, inverse.T / lengths[:, None]


def _eigen(gram: Float[Tensor, "r r"]) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r r"]]:
    """`R = Λ^½ Vᵀ` of the Gram matrix `V Λ Vᵀ`, and its pseudoinverse."""
    values, V = linalg.eigh(gram)
    least = values[-1:] * len(values) * torch.finfo(torch.float64).eps
    root = torch.where(values > least, values, 0.0).clamp(min=0).sqrt()
    inverse = torch.where(root > 0, 1 / torch.where(root > 0, root, 1.0), 0.0)
    return root[:, None] * V.T, V * inverse


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
