"""Model Stock: the mean, drawn back to the base model by the angle between the updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors, inner, weighted_sum
from orthomerge.merging.registry import register


@register(
    name="model_stock",
    title="Model Stock",
    summary="Use for several runs of one task: it keeps only what the runs have in common.",
    paper="Jang et al. 2024, Model Stock",
    url="https://arxiv.org/abs/2403.19522",
    low_rank=True,
)
def model_stock(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """`t Σ w_i ΔW_i / Σ w_i` with `t = N cos θ / (1 + (N-1) cos θ)`, exact in factors.

    cos θ is the mean over pairs of the cosine between the layer's updates (the paper takes the
    angle as one; the mean of pairs is mergekit's reading), counted as 0 where negative or where an
    update is zero. Orthogonal updates so give zero: this is for runs of one task. One adapter
    gives itself. O(N² r² (d_in + d_out)).

    Raises:
        MergeError: the weights sum to zero.

    Source: Jang et al. 2024, arXiv 2403.19522.
    """
    total = sum(weights)
    if total == 0:
        raise MergeError("model_stock needs weights that do not sum to zero.")
    count = len(factors)
    t = 1.0
    if count > 1:
        norms = [math.sqrt(max(inner(f, f), 0.0)) for f in factors]
        cosines = [
            inner(factors[i], factors[j]) / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0
            for i, j in combinations(range(count), 2)
        ]
        cosine = max(sum(cosines) / len(cosines), 0.0)
        t = count * cosine / (1 + (count - 1) * cosine)
    return weighted_sum(factors, [t * w / total for w in weights])
