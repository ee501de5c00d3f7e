"""Iso-CTS: a common subspace and some directions of each task's own, with equal singular values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthomerge.factors import LoraFactors, weighted_sum
from orthomerge.merging.parts.lowrank import nonzero, polar, span_of, thin_svd, zero_like
from orthomerge.merging.parts.options import check_fraction, check_number
from orthomerge.merging.registry import register


@register(
    name="iso_cts",
    title="Iso-CTS",
    summary="Use in place of Iso-C for many tasks: each keeps directions the sum would drown.",
    paper="Marczak et al. 2025, No Task Left Behind",
    url="https://arxiv.org/abs/2502.04959",
    low_rank=True,
)
def iso_cts(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    common_space_fraction: float = 0.8,
    lambda_: float = 1.0,
) -> LoraFactors:
    """`λ σ̄ U⊥ V⊥ᵀ`: the sum's top directions and, beside them, each task's own, made orthonormal.

    Of the K = rank of `Σ w_i ΔW_i` directions (the paper takes min(d), here the span of the
    adapters) the first k, about `common_space_fraction` of K, are kept; every task adds the
    (K - k) / N top directions of `(I - U_k U_kᵀ) w_i ΔW_i`. Both sides are replaced by the nearest
    orthonormal sets and the singular values by their mean. Not lossless even for one adapter.
    O((d_in + d_out) R² + R³), R = Σ r_i.

    Raises:
        MergeError: an option value out of its range.

    Source: Marczak et al. 2025, arXiv 2502.04959, algorithm 2.
    """
    check_fraction("common_space_fraction", common_space_fraction)
    check_number("lambda_", lambda_)
    present, kept = nonzero(factors, weights)
    if not present:
        return zero_like(factors[0])
    span = span_of(present)
    small, like = span.factors, span.like
    U, s, Vh = thin_svd(weighted_sum(small, kept), like)
    if not len(s):
        return zero_like(like)
    each = round((len(s) - int(len(s) * common_space_fraction)) / len(present))
    common = len(s) - each * len(present)
    us, ss, vs = [U[:, :common]], [s[:common]], [Vh[:common]]
    for f, w in zip(small, kept, strict=True):
        B = (w * f.scaling) * f.B
        rest = LoraFactors(f.A, B - us[0] @ (us[0].T @ B), 1.0)
        u, values, vh = thin_svd(rest)
        us.append(u[:, :each])
        ss.append(values[:each])
        vs.append(vh[:each])
    left, right = (polar(x, like.A.dtype) for x in (torch.cat(us, dim=1), torch.cat(vs).T))
    return span.lift(LoraFactors(right.T, left * torch.cat(ss).mean(), lambda_))
