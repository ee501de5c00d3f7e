"""Iso-C: the exact sum with its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence

from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.merging.parts.lowrank import span_of, thin_svd, zero_like
from orthomerge.merging.parts.options import check_number
from orthomerge.merging.registry import register


@register(
    name="iso_c",
    title="Iso-C",
    summary="Use when a few shared directions dominate the sum and drown the others.",
    paper="Marczak et al. 2025, No Task Left Behind",
    url="https://arxiv.org/abs/2502.04959",
    low_rank=True,
)
def iso_c(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, lambda_: float = 1.0
) -> LoraFactors:
    """`λ σ̄ U Vᵀ`, where `Σ w_i ΔW_i = U diag(σ) Vᵀ` and σ̄ is the mean of its singular values.

    For adapters the mean is over the non-zero singular values (the span of the adapters, as in the
    core space of arXiv 2509.17786): directions that no adapter uses stay at zero. Not lossless
    even for one adapter. O((d_in + d_out) R² + R³), R = Σ r_i.

    Raises:
        MergeError: `lambda_` is not a finite number.

    Source: Marczak et al. 2025, arXiv 2502.04959.
    """
    check_number("lambda_", lambda_)
    span = span_of(factors)
    U, s, Vh = thin_svd(weighted_sum(span.factors, weights), span.like)
    if not len(s):
        return zero_like(span.like)
    return span.lift(LoraFactors(Vh, U * s.mean(), lambda_))
