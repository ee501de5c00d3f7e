"""SLERP: along the arc between two updates, kept in factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors, inner, weighted_sum
from orthomerge.merging.registry import register

_NEARLY_PARALLEL = 0.9995


@register(
    name="slerp",
    title="SLERP",
    summary="Use for two adapters, to mix them without losing length as a mean does.",
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    url="https://doi.org/10.1145/325165.325242",
    low_rank=True,
)
def slerp(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """`(sin((1-t)θ) ΔW_1 + sin(tθ) ΔW_2) / sin θ` with `t = w_2 / (w_1 + w_2)`, exact in factors.

    θ is the angle between the two updates of the layer in the Frobenius inner product. Where they
    are nearly parallel (`|cos θ| > 0.9995`) or one is zero, the straight line between them is
    taken. O(r² (d_in + d_out)).

    Raises:
        MergeError: not two adapters, or weights that are negative or sum to zero.

    Source: Shoemake 1985, doi 10.1145/325165.325242.
    """
    if len(factors) != 2:
        raise MergeError(f"slerp merges exactly two adapters, not {len(factors)}: use linear.")
    if min(weights) < 0 or sum(weights) == 0:
        raise MergeError(f"slerp needs weights that are not negative nor all zero, not {weights}.")
    t = weights[1] / sum(weights)
    first, second = factors
    norms = math.sqrt(max(inner(first, first), 0.0) * max(inner(second, second), 0.0))
    cosine = inner(first, second) / norms if norms else 1.0
    if abs(cosine) > _NEARLY_PARALLEL:
        return weighted_sum(factors, [1 - t, t])
    angle = math.acos(cosine)
    return weighted_sum(factors, [math.sin(x * angle) / math.sin(angle) for x in (1 - t, t)])
