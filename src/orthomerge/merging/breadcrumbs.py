"""Model Breadcrumbs: sum the updates without their outliers and without their dust."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging.parts.consensus import weighted_total
from orthomerge.merging.parts.elementwise import elementwise
from orthomerge.merging.parts.options import check_fraction
from orthomerge.merging.parts.sparsify import band
from orthomerge.merging.registry import Update, register


@register(
    name="breadcrumbs",
    title="Model Breadcrumbs",
    summary="Use when a few outsized entries of single adapters disturb the sum.",
    paper="Davari & Belilovsky 2024, Model Breadcrumbs",
    url="https://arxiv.org/abs/2312.06795",
)
def breadcrumbs(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    lambda_: float = 1.0,
    space: str = "delta",
) -> Update:
    """`λ Σ w_i m_i ⊙ ΔW_i`: m_i drops the `gamma` share of largest entries, keeps `density` next.

    What is left, the 1 - density - gamma share of smallest entries, is dropped. Masks are per
    layer. Dense `[d_out, d_in]` in the space "delta", factors in the others (see `ties`).
    O(N d_out d_in).

    Raises:
        MergeError: an option value out of its range, or density + gamma above 1.

    Source: Davari & Belilovsky 2024, arXiv 2312.06795 (its β is 1 - density - gamma).
    """
    check_fraction("density", density)
    check_fraction("gamma", gamma, zero=True)
    if density + gamma > 1 + 1e-9:
        raise MergeError(
            f"options 'density' and 'gamma' must sum to at most 1, not {density} + {gamma}."
        )
    return elementwise(
        factors,
        weights,
        sparsify=lambda update: band(update, density, gamma),
        consensus=weighted_total,
        space=space,
        lambda_=lambda_,
    )
