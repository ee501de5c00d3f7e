"""EMR: elect one unified update, keep a mask and a scale a task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.registry import PerTask, register


@register(
    name="emr",
    title="EMR",
    summary="Use when the task is known at inference: one shared update, a mask and scale a task.",
    paper="Huang et al. 2024, EMR-Merging",
    url="https://arxiv.org/abs/2405.17461",
    per_task=True,
)
def emr(factors: Sequence[LoraFactors], weights: Sequence[float]) -> PerTask:
    """`λ_t M_t ⊙ τ_uni`: τ_uni elected from all, M_t where task t agrees with its sign.

    With `τ_t = w_t ΔW_t`: the unified `τ_uni` has the sign of `Σ τ_t` and, at each place, the
    largest magnitude among the updates of that sign; `M_t = [τ_t ⊙ τ_uni > 0]` and
    `λ_t = Σ|τ_t| / Σ|M_t ⊙ τ_uni|`. Dense `[d_out, d_in]` for every task. O(N d_out d_in).

    Source: Huang et al. 2024, arXiv 2405.17461, section 3.
    """
    updates = torch.stack([w * f.delta() for f, w in zip(factors, weights, strict=True)])
    sign = torch.where(updates.sum(dim=0) >= 0, 1.0, -1.0).to(updates)
    unified = sign * (updates * sign).clamp(min=0).amax(dim=0)
    tasks: list[Tensor] = []
    for update in updates:
        masked = torch.where(update * unified > 0, unified, torch.zeros_like(unified))
        size = masked.abs().sum()
        tasks.append(masked * (update.abs().sum() / size) if size > 0 else masked)
    return PerTask(unified, tasks)
