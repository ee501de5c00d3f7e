"""EMR: elect one unified update, keep a mask and a scale a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.options import check_choice
from orthomerge.merging.registry import PerTask, register


def _sizes(factors: Sequence[LoraFactors], weights: Sequence[float]) -> Float[Tensor, "2 tasks"]:
    """`Σ|τ_t|` and `Σ|M_t ⊙ τ_uni|` of one layer."""
    updates, _, masked = _elected(factors, weights)
    return torch.stack([x.abs().sum(dim=(1, 2), dtype=torch.float64) for x in (updates, masked)])


@register(
    name="emr",
    title="EMR",
    summary="Use when the task is known at inference: a shared update, a mask and scale per task.",
    paper="Huang et al. 2024, EMR-Merging",
    url="https://arxiv.org/abs/2405.17461",
    per_task=True,
    survey=_sizes,
)
def emr(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    over_model: Callable[[], Tensor],
    rescale: str = "model",
) -> PerTask:
    """`λ_t M_t ⊙ τ_uni`: τ_uni elected from all, M_t where task t agrees with its sign.

    With `τ_t = w_t ΔW_t`: the unified `τ_uni` has the sign of `Σ τ_t` and, at each place, the
    largest magnitude among the updates of that sign; `M_t = [τ_t ⊙ τ_uni > 0]` and
    `λ_t = Σ|τ_t| / Σ|M_t ⊙ τ_uni|`, its sums over all layers, as in both published codes, or with
    `rescale="layer"` over each layer alone. Dense `[d_out, d_in]` for every task.
    O(N d_out d_in), twice.

    Raises:
        MergeError: `rescale` is neither "model" nor "layer".

    Source: Huang et al. 2024, arXiv 2405.17461, section 3, and its code.
    """
    check_choice("rescale", rescale, ("model", "layer"))
    _, unified, masked = _elected(factors, weights)
    sizes = over_model() if rescale == "model" else _sizes(factors, weights)
    scales = [float(own / size) if size > 0 else 1.0 for own, size in sizes.T]
    return PerTask(unified, [scale * mine for scale, mine in zip(scales, masked, strict=True)])


def _elected(
    factors: Sequence[LoraFactors], weights: Sequence[float]
) -> tuple[
    Float[Tensor, "tasks d_out d_in"],
    Float[Tensor, "d_out d_in"],
    Float[Tensor, "tasks d_out d_in"],
]:
    """The updates, the unified one, and what of it each task keeps."""
    updates = torch.stack([w * f.delta() for f, w in zip(factors, weights, strict=True)])
    sign = torch.where(updates.sum(dim=0) >= 0, 1.0, -1.0).to(updates)
    unified = sign * (updates * sign).clamp(min=0).amax(dim=0)
    return updates, unified, torch.where(updates * unified > 0, unified, 0.0)
