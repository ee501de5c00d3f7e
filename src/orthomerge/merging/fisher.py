"""Fisher merging: each entry averaged by how much it matters to each task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.options import check_bool, check_positive
from orthomerge.merging.registry import register


@register(
    name="fisher",
    title="Fisher",
    summary="Use when you have each adapter's Fisher information: entries that matter count more.",
    paper="Matena & Raffel 2022, Merging models with Fisher-weighted averaging",
    url="https://arxiv.org/abs/2111.09832",
)
def fisher(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    fisher: Sequence[Tensor],
    normalize: bool = True,
    ridge: float = 1e-6,
) -> Tensor:
    """`Σ F_i ⊙ w_i ΔW_i / Σ F_i`, entry by entry, F_i the diagonal Fisher information of task i.

    With `normalize` every F_i is divided by its mean over the layer, so that a task of large
    gradients does not take all; `ridge`, in units of that mean, is added to every F_i: where
    nothing matters to anyone the updates are averaged. Dense `[d_out, d_in]`. O(N d_out d_in).

    Raises:
        MergeError: an option value out of its range.

    Source: Matena & Raffel 2022, arXiv 2111.09832, equation 7.
    """
    check_bool("normalize", normalize)
    check_positive("ridge", ridge)
    total: Tensor | None = None
    mixed: Tensor | None = None
    for f, w, information in zip(factors, weights, fisher, strict=True):
        mean = float(information.mean())
        F = information / mean if normalize and mean > 0 else information
        F = F + ridge * (float(F.mean()) or 1.0)
        part = F * (w * f.delta())
        total = F if total is None else total + F
        mixed = part if mixed is None else mixed + part
    assert mixed is not None and total is not None
    return mixed / total
