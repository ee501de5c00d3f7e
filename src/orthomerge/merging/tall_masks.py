"""TALL masks: which entries of the sum belong to which task; consensus keeps the shared ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.options import check_number, check_positive, check_rank
from orthomerge.merging.registry import PerTask, register

_PAPER = "Wang et al. 2024, Localizing task information for improved model merging"
_URL = "https://arxiv.org/abs/2405.07813"


@register(
    name="tall_masks",
    title="TALL masks",
    summary="Use when the task is known at inference: the sum, masked to what each task needs.",
    paper=_PAPER,
    url=_URL,
    per_task=True,
)
def tall_masks(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, tall_lambda: float = 0.4
) -> PerTask:
    """`m_t ⊙ τ` with `τ = Σ w_i ΔW_i` and `m_t = [|τ_t| ≥ tall_lambda · |τ - τ_t|]`.

    A larger `tall_lambda` keeps fewer entries. Dense `[d_out, d_in]` for every task.
    O(N d_out d_in).

    Raises:
        MergeError: `tall_lambda` is not positive.

    Source: Wang et al. 2024, arXiv 2405.07813, equation 5.
    """
    _, total, masks = _masks(factors, weights, tall_lambda)
    return PerTask(total, [torch.where(mask, total, 0.0) for mask in masks])


@register(
    name="consensus_ta",
    title="Consensus task arithmetic",
    summary="Use to drop from the sum what no task or a single task alone makes use of.",
    paper=_PAPER,
    url=_URL,
)
def consensus_ta(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    tall_lambda: float = 0.4,
    agree: int = 2,
    lambda_: float = 1.0,
) -> Tensor:
    """`λ [Σ_t m_t ≥ agree] ⊙ Σ w_i ΔW_i`, m_t the TALL masks: entries of at least `agree` tasks.

    What only one task uses ("selfish") and what none uses ("catastrophic") is removed. With fewer
    adapters than `agree`, all of them have to agree. Dense `[d_out, d_in]`. O(N d_out d_in).

    Raises:
        MergeError: an option value out of its range.

    Source: Wang et al. 2024, arXiv 2405.07813, section 4.2.
    """
    check_rank("agree", agree, none=False)
    check_number("lambda_", lambda_)
    _, total, masks = _masks(factors, weights, tall_lambda)
    present = sum(bool(f.A.any()) and bool(f.B.any()) for f in factors)
    wanted = masks.sum(dim=0) >= min(agree, max(present, 1))
    return lambda_ * torch.where(wanted, total, 0.0)


def _masks(
    factors: Sequence[LoraFactors], weights: Sequence[float], tall_lambda: float
) -> tuple[
    Float[Tensor, "n d_out d_in"], Float[Tensor, "d_out d_in"], Bool[Tensor, "n d_out d_in"]
]:
    """The updates, their sum, and every task's mask (no entry of a zero update is its own)."""
    check_positive("tall_lambda", tall_lambda)
    updates = torch.stack([w * f.delta() for f, w in zip(factors, weights, strict=True)])
    total = updates.sum(dim=0)
    own = updates.abs()
    masks = (own >= tall_lambda * (total - updates).abs()) & (own > 0)
    return updates, total, masks
