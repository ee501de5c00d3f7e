"""Where an elementwise method works: on the dense update, or on A and B apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.options import LayerProblem

SPACES = ("delta", "factors")

Combine = Callable[[Float[Tensor, "n rows columns"], Float[Tensor, " n"]], Tensor]


def combine_in(
    space: str, factors: Sequence[LoraFactors], weights: Sequence[float], combine: Combine
) -> LoraFactors | Tensor:
    """Apply `combine(stacked updates, weights)` in the space asked for.

    - "delta": on the dense updates `ΔW_i = s_i B_i A_i`: what the papers define. O(N d_out d_in).
    - "factors": on the A_i with weights `sign(w_i s_i) √|w_i s_i|` and on the B_i with
      `√|w_i s_i|`, as PEFT's `add_weighted_adapter` does. The product of the two results has cross
      terms `B_i A_j`, i ≠ j, that belong to no adapter: O(N r (d_in + d_out)), an approximation.

    Raises:
        LayerProblem: "factors" and the ranks differ (an absent layer has any rank).
    """
    if space == "delta":
        deltas = torch.stack([f.delta() for f in factors])
        return combine(deltas, deltas.new_tensor(weights))
    ranks = sorted({f.rank for f in factors if f.rank})
    if len(ranks) > 1:
        raise LayerProblem(
            f"space 'factors' needs equal ranks, not {', '.join(map(str, ranks))}: "
            "use space 'delta'."
        )
    rank = ranks[0] if ranks else 0
    A = torch.stack([f.A if f.rank else f.A.new_zeros(rank, f.A.shape[1]) for f in factors])
    B = torch.stack([f.B if f.rank else f.B.new_zeros(f.B.shape[0], rank) for f in factors])
    both = A.new_tensor([w * f.scaling for f, w in zip(factors, weights, strict=True)])
    root = both.abs().sqrt()
    signed = torch.where(both >= 0, root, -root)
    return LoraFactors(combine(A, signed), combine(B, root), 1.0)


def scale(update: LoraFactors | Tensor, by: float) -> LoraFactors | Tensor:
    """The update times a number."""
    if isinstance(update, LoraFactors):
        return LoraFactors(update.A, update.B, update.scaling * by)
    return update * by
