"""A method as a row of three choices: sparsifier × consensus × space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.options import check_choice, check_number
from orthomerge.merging.parts.space import SPACES, combine_in, scale
from orthomerge.merging.registry import Update

Sparsify = Callable[[Float[Tensor, "rows columns"]], Float[Tensor, "rows columns"]]
Consensus = Callable[
    [Float[Tensor, "n rows columns"], Float[Tensor, " n"]], Float[Tensor, "rows columns"]
]


def elementwise(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    consensus: Consensus,
    sparsify: Sparsify | None = None,
    space: str = "delta",
    lambda_: float = 1.0,
) -> Update:
    """`λ · consensus(sparsify(ΔW_1), ..., sparsify(ΔW_N); w)`, entry by entry in a space.

    Dense in the space "delta", factors in the others; see `combine_in` for the spaces and costs.

    Raises:
        MergeError: an unknown space, or a lambda that is not a finite number.
    """
    check_choice("space", space, SPACES)
    check_number("lambda_", lambda_)

    def combine(updates: Tensor, w: Tensor) -> Tensor:
        if sparsify is not None:
            for update in updates:  # the stack is made for this merge: no second one is held
                kept = sparsify(update)
                if kept is not update:
                    update.copy_(kept)
        return consensus(updates, w)

    return scale(combine_in(space, factors, weights, combine), lambda_)
