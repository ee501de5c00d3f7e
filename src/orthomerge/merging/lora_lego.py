"""LoRA-LEGO: adapters taken apart into rank-one units, clustered, and put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from orthomerge import linalg
from orthomerge.factors import LoraFactors, thin_qr
from orthomerge.merging.parts.lowrank import nonzero, zero_like
from orthomerge.merging.parts.options import check_bool, check_rank
from orthomerge.merging.registry import register


@register(
    name="lora_lego",
    title="LoRA-LEGO",
    summary="Use to merge adapters of any ranks to one of a chosen rank by clustering their parts.",
    paper="Zhao et al. 2025, Merging LoRAs like playing LEGO",
    url="https://arxiv.org/abs/2409.16167",
    symmetric=False,
    low_rank=True,
    by_factors=True,
)
def lora_lego(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    clusters: int | None = None,
    reweight: bool = True,
) -> LoraFactors:
    """Centroids of k clusters of all units `[a_j; b_j]`, as an adapter of rank k.

    A unit is one row of A with its column of B (scaling and weight in B, the two halves brought to
    equal norm, which leaves `b_j a_jᵀ` alone); k-means groups them and each centroid is a unit of
    the result. `clusters` is k, the largest input rank when None. With `reweight` a centroid gets
    the mean norm of its members (averaging shrinks it) and the result is scaled by `√(r / k)`, r
    the mean input rank. One cluster per unit gives the exact sum.
    O(R² (d_in + d_out + k · iterations)), R = Σ r_i.

    Raises:
        MergeError: an option value out of its range.

    Source: Zhao et al. 2025, arXiv 2409.16167, section 4; the scalings from its "dual reweighting".
    """
    check_rank("clusters", clusters)
    check_bool("reweight", reweight)
    present, kept = nonzero(factors, weights)
    if not present:
        return zero_like(factors[0])
    B = [(w * f.scaling) * f.B.double().T for f, w in zip(present, kept, strict=True)]
    # A power of two is taken off and put back exactly, so that k-means sees the same units
    # whatever the updates are measured in: it turns on the last bit of them.
    largest = max(float(b.abs().max()) for b in B)
    power = math.floor(math.log2(largest)) if 0 < largest < math.inf else 0
    units = torch.cat([_units(f, b / 2.0**power) for f, b in zip(present, B, strict=True)])
    units = units[units.any(dim=1)]
    if not len(units):
        return zero_like(factors[0])
    k = min(clusters or max(f.rank for f in present), len(units))
    d_in = factors[0].shape[1]
    if k < len(units):
        units = _centroids(units, k, reweight, factors[0].A.dtype)
        if reweight:
            rank = sum(f.rank for f in present) / len(present)
            units = units * (rank / k) ** 0.25  # on both halves: √(r / k) on their product
    like = factors[0]
    half = power // 2
    A, joined = 2.0**half * units[:, :d_in], 2.0 ** (power - half) * units[:, d_in:].T
    return LoraFactors(A.to(like.A), joined.to(like.B), 1.0)


def _units(factors: LoraFactors, B: torch.Tensor) -> torch.Tensor:
    """`[r, d_in + d_out]`, float64: each row of A beside its column of B, of equal norms."""
    A = factors.A.double()
    a, b = linalg.vector_norm(A, dim=1, keepdim=True), linalg.vector_norm(B, dim=1, keepdim=True)
    balance = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 0.0)
    balance = torch.nan_to_num(balance)
    return torch.cat([A * balance, torch.where(balance > 0, B / balance, 0.0)], dim=1)


def _centroids(units: torch.Tensor, k: int, reweight: bool, dtype: torch.dtype) -> torch.Tensor:
    # Two seconds to import, and most merges never get here.
    from sklearn.cluster import KMeans

    # Distances are the same in the units' own span, of as many dimensions as there are units. The
    # tolerance is relative to the mean variance of a dimension, of which there are fewer.
    points = thin_qr(units.T, dtype, weak=False)[1].T
    restarts: Any = 10  # its annotation knows "auto" alone
    tolerance = 1e-4 * points.shape[1] / units.shape[1]
    kmeans: Any = KMeans(k, n_init=restarts, random_state=0, tol=tolerance)
    labels = torch.as_tensor(kmeans.fit_predict(points.cpu().numpy()), device=units.device)
    member = (labels == torch.arange(k, device=units.device)[:, None]).to(units)
    centroids = (member / member.sum(dim=1, keepdim=True)) @ units
    if reweight:
        lengths = linalg.vector_norm(units, dim=1)
        wanted = (member @ lengths) / member.sum(dim=1)
        norms = linalg.vector_norm(centroids, dim=1)
        centroids = centroids * torch.where(norms > 0, wanted / norms, 1.0)[:, None]
    return centroids
