"""Adapters that exist already, refitted: pure algebra on factors and second moments.

Three ways to move an update out of what other tasks' inputs occupy. `refit_rows` gives it other
rows of `A` and the best `B` for them; `refit_within` and `refit_low_energy` leave `B` and move `A`,
which loses no rank, since the best update over all of an admissible subspace is `B` times new rows.
All arithmetic is float64; the dense update is never formed, and neither is a d_in × d_in matrix
where the moments hold fewer rows than that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import SubspaceError
from orthomerge.factors import LoraFactors, energy, inner, weighted_sum
from orthomerge.moments import Moment, combine

RIDGE = 0.1
"""Part of the mean energy of a direction that is added to every direction before a solve."""
# Singular values below this part of the largest are rounding, whatever they are inverted for.
_ROUNDING = 1e-12


class Loss(NamedTuple):
    """What a refit changed, as squared norms, so that layers add up.

    `weights` is `‖ΔW‖²` and `weights_lost` `‖ΔW − ΔW'‖²`; `own` and `own_lost` are the same on the
    own task's inputs, `tr(· S ·ᵀ)`, NaN without its statistics; `others_before` and `others_after`
    are `tr(ΔW S_other ΔWᵀ)` and that of `ΔW'`.
    """

    weights: float
    weights_lost: float
    own: float
    own_lost: float
    others_before: float
    others_after: float

    def __add__(self, other: object) -> Loss:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def share_of_weights(self) -> float:
        """`‖ΔW − ΔW'‖ / ‖ΔW‖`."""
        return _root(self.weights_lost, self.weights)

    @property
    def share_of_outputs(self) -> float:
        """`‖(ΔW − ΔW') H_tᵀ‖ / ‖ΔW H_tᵀ‖`: the part of the own task's outputs that is lost."""
        return _root(self.own_lost, self.own)

    @property
    def heard_before(self) -> float:
        """`‖ΔW H_otherᵀ‖ / ‖ΔW H_tᵀ‖`, by row: what the others hear, the own output being 1."""
        return _root(self.others_before, self.own)

    @property
    def heard_after(self) -> float:
        """`‖ΔW' H_otherᵀ‖ / ‖ΔW H_tᵀ‖`: the same after the refit, on the same scale."""
        return _root(self.others_after, self.own)

    @property
    def heard_still(self) -> float:
        """`‖ΔW' H_otherᵀ‖ / ‖ΔW H_otherᵀ‖`: what is left of what the others heard."""
        return _root(self.others_after, self.others_before)


def _root(part: float, whole: float) -> float:
    return (max(part, 0.0) / whole) ** 0.5 if whole else 0.0


def measure(before: LoraFactors, after: LoraFactors, own: Moment | None, others: Moment) -> Loss:
    """What became of an update, from products of small factors. O(r d_in² + r² (d_in + d_out))."""
    before, after = before.to(torch.float64), after.to(torch.float64)
    gone = weighted_sum([before, after], [1.0, -1.0])
    return Loss(
        weights=inner(before, before),
        weights_lost=max(inner(gone, gone), 0.0),
        own=float("nan") if own is None else max(energy(before, own), 0.0),
        own_lost=float("nan") if own is None else max(energy(gone, own), 0.0),
        others_before=max(energy(before, others), 0.0),
        others_after=max(energy(after, others), 0.0),
    )


def refit_rows(
    factors: LoraFactors,
    rows: Float[Tensor, "k d_in"],
    own: Moment | None = None,
    *,
    ridge: float = RIDGE,
) -> LoraFactors:
    """The best `B'` for given rows `A'`: `min ‖(s B'A' − ΔW) (S + ρI)^½‖_F`.

    `B' = ΔW S_ρ A'ᵀ (A' S_ρ A'ᵀ)⁺ / s` with `S_ρ = S + ρI`, `S` the own task's second moment and
    `ρ = ridge · tr(S) / d_in`. Without `own` it is the orthogonal projection of `ΔW`'s rows onto
    those of `A'`, `B' = ΔW A'ᵀ (A'A'ᵀ)⁺ / s`, to which a large ridge tends as well: the paper's
    conversion (arXiv 2505.22934), with the scaling `s` that its code leaves out. Rows of `A'` that
    depend on others to 1e-12 count once. The result has `A' = rows` and the same scaling.
    O(k r d_in + k² d_in), and what `Moment.apply` takes for k columns.

    Raises:
        SubspaceError: rows or a moment of another width, or a ridge that is negative.
    """
    _check(factors, rows.shape[1], own, ridge)
    A, B, wide = factors.A.double(), factors.B.double(), rows.double()
    U, s, Q = linalg.svd(wide, full_matrices=False)
    kept = s > _ROUNDING * s[:1]
    U, s, Q = U[:, kept], s[kept], Q[kept]
    if own is None:
        onto = A @ Q.T
    else:
        seen = own.apply(Q.T) + _level(own, ridge) * Q.T  # S_ρ Qᵀ: [d_in, k]
        onto = _divide(A @ seen, Q @ seen)
    scaled = (onto / s) @ U.T  # [r, k]: B' = B · this, and s stays where it was
    dtype = factors.B.dtype
    return LoraFactors(rows.to(factors.A.dtype), (B @ scaled).to(dtype), factors.scaling)


def refit_within(
    factors: LoraFactors,
    directions: Float[Tensor, "k d_in"],
    own: Moment | None = None,
    *,
    within: bool = False,
    ridge: float = RIDGE,
) -> LoraFactors:
    """The best update whose rows stay out of orthonormal `directions` `D` (or `within` them).

    `min ‖(ΔW' − ΔW) (S + ρI)^½‖_F  s.t. ΔW' Dᵀ = 0`, with `P = I − DᵀD`:
    `A' = AP + A(I−P) S P (P S P + ρI)⁺`, and `B' = B`, so that rank and scaling stay. What is
    removed along dominant directions returns along low-energy ones that are correlated with them
    on the own task's inputs.
    Without `own` it is `A' = AP`. O(n² d_in) for moments of n rows, else O(d_in³).

    Raises:
        SubspaceError: directions or a moment of another width, or a ridge that is negative.
    """
    _check(factors, directions.shape[1], own, ridge)
    A, D = factors.A.double(), directions.double()

    def allowed(rows: Tensor) -> Tensor:
        inside = (rows @ D.T) @ D
        return inside if within else rows - inside

    moved = allowed(A)
    if own is not None:
        taken = A - moved
        level, held = _level(own, ridge), _few_rows(own)
        if held is not None:
            moved = moved + _ridge_rows(taken @ held.T, allowed(held), level)
        else:
            low = allowed(allowed(own.matrix).T)
            moved = moved + _ridge_matrix(allowed(own.apply(taken.T).T), low, level)
        moved = allowed(moved)  # what rounding left on the wrong side
    return LoraFactors(moved.to(factors.A.dtype), factors.B, factors.scaling)


def refit_low_energy(
    factors: LoraFactors,
    own: Moment,
    others: Moment,
    *,
    balance: float = 1.0,
    ridge: float = RIDGE,
) -> LoraFactors:
    """The update that keeps its own outputs and adds little to the others', weighed against it.

    `min ‖(ΔW' − ΔW) H_tᵀ‖² + λ ‖ΔW' H_otherᵀ‖² + ρ ‖ΔW' − ΔW‖²`, whose solution is
    `A' = A (S + ρI)(S + λ S_other + ρI)⁻¹`, `B' = B`; λ is `balance`. With `S_other` the sum over
    the other tasks and ρ = 0 the sum of all tasks' updates is RegMean (arXiv 2212.09849), which
    here each task works out for itself. O(n² d_in) for moments of n rows, else O(d_in³).

    Raises:
        SubspaceError: moments of another width, or a balance or ridge that is negative.
    """
    _check(factors, others.dim, own, ridge)
    if not balance >= 0:
        raise SubspaceError(f"balance {balance} is negative: 1 weighs own and others alike.")
    A, level = factors.A.double(), _level(own, ridge)
    both = combine([own, others], [1.0, balance])
    held, other_rows = _few_rows(both), others.factor
    if held is not None and other_rows is not None:
        # `combine` stacks the own rows first and makes the weights sum to one.
        scale = (1.0 + balance) ** 0.5
        heard = torch.zeros(A.shape[0], held.shape[0], dtype=A.dtype, device=A.device)
        heard[:, held.shape[0] - other_rows.shape[0] :] = balance**0.5 * (A @ other_rows.T)
        gone = _ridge_rows(heard, scale * held, level)
    else:
        heard = balance * others.apply(A.T).T
        gone = _ridge_matrix(heard, (1.0 + balance) * both.matrix, level)
    return LoraFactors((A - gone).to(factors.A.dtype), factors.B, factors.scaling)


def _check(factors: LoraFactors, width: int, own: Moment | None, ridge: float) -> None:
    d_in = factors.shape[1]
    for what, dim in (("the rows", width), ("the statistics", own.dim if own else d_in)):
        if dim != d_in:
            raise SubspaceError(
                f"the adapter has {d_in} inputs and {what} {dim}: they belong to another layer or "
                "model."
            )
    if not 0 <= ridge < float("inf"):
        raise SubspaceError(f"ridge {ridge} is not a number from 0 up: {RIDGE:g} is the default.")


def _level(own: Moment, ridge: float) -> float:
    """`ρ`: that part of the mean energy of a direction."""
    return ridge * own.trace / own.dim


def _few_rows(moment: Moment) -> Tensor | None:
    """The moment's factor, where it has fewer rows than a matrix."""
    rows = moment.factor
    return rows if rows is not None and rows.shape[0] < moment.dim else None


def _ridge_rows(z: Float[Tensor, "r n"], rows: Float[Tensor, "n d_in"], level: float) -> Tensor:
    """`z F (FᵀF + ρI)⁺ = z (FFᵀ + ρI)⁺ F`."""
    return _divide(z, _raised(rows @ rows.T, level)) @ rows


def _ridge_matrix(
    y: Float[Tensor, "r d_in"], matrix: Float[Tensor, "d_in d_in"], level: float
) -> Tensor:
    """`y (M + ρI)⁺`, for rows `y` in the row space of `M`."""
    return _divide(y, _raised(matrix, level))


def _raised(matrix: Tensor, level: float) -> Tensor:
    return matrix + level * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _divide(y: Float[Tensor, "r n"], gram: Float[Tensor, "n n"]) -> Float[Tensor, "r n"]:
    """`y G⁺` for a symmetric `G` without negative eigenvalues: by Cholesky where it is regular."""
    lower, info = linalg.cholesky_ex(gram)
    pivots = torch.diagonal(lower).square()
    if int(info) == 0 and len(pivots) and bool(pivots.min() > 1e-10 * pivots.max()):
        return torch.cholesky_solve(y.T, lower).T
    values, vectors = linalg.eigh(gram)
    kept = values > _ROUNDING * values[-1:].clamp_min(0.0)
    values, vectors = values[kept], vectors[:, kept]
    return ((y @ vectors) / values) @ vectors.T
