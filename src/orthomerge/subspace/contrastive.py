"""`contrastive`: silent on the others, still loud on its own task (beyond the paper)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import SubspaceError
from orthomerge.subspace._types import Subspace, check_moment, describe, orthonormal_rows
from orthomerge.subspace.registry import register


@register(
    "contrastive",
    title="most own energy per energy of the others: a generalised eigenproblem",
    paper="ours; the generalised Rayleigh quotient of common spatial patterns",
    needs_own=True,
)
def contrastive(
    other: Float[Tensor, "d_in d_in"],
    rank: int,
    *,
    own: Float[Tensor, "d_in d_in"] | None = None,
    seed: int = 0,
    balance: float = 0.01,
) -> Subspace:
    """The span of the top eigenvectors of `S_own v = λ (S_other + ε I) v`, made orthonormal.

    `ε = balance · tr(S_other) / d_in`: a small `balance` insists on silence over the others, a
    large one turns towards the plain top directions of the own task. O(d_in³).

    Raises:
        SubspaceError: no own statistics, a `balance` that is not positive, or a bad moment.
    """
    check_moment(other, rank, own)
    if own is None:
        raise SubspaceError(
            "the solver 'contrastive' needs the task's own statistics: pass own=, or --own."
        )
    if not balance > 0:
        raise SubspaceError(f"balance must be positive, not {balance}: 0.01 is the default.")
    size = other.shape[0]
    mean_energy = float(torch.trace(other.double())) / size
    ridge = balance * (mean_energy if mean_energy > 0 else 1.0)
    values, vectors = torch.linalg.eigh(other.double())
    # Whiten by the inverse square root of S_other + εI: an ordinary eigenproblem remains.
    whiten = vectors / (values.clamp_min(0.0) + ridge).sqrt()
    _, directions = torch.linalg.eigh(whiten.T @ own.double() @ whiten)
    basis = orthonormal_rows((whiten @ directions[:, -rank:].flip(1)).T)
    return describe(basis, other, own, size)
