"""Publishing only the strongest directions of a second moment, blurred by noise of a stated size.

With `e = tr(S) / d_in`, the mean energy of a direction, and `σ` the size of the noise:

- a full moment: `S + N`, `N` symmetric, its upper triangle with the diagonal independent
  `N(0, (σ e)²)`: the form of Analyze Gauss (Dwork et al. 2014, doi 10.1145/2591796.2591883). Then
  the top k eigenpairs, negative eigenvalues set to zero.
- a factored moment `S = RᵀR` (rows, sketch, mean), never made dense: its top k scaled directions
  `√λ_i v_i`, each of their k d_in entries with independent `N(0, σ² e)` added. The next eigenvalue
  is given with noise `N(0, (σ e)²)`.

What comes out is a row moment of at most k rows whose slack is the (noisy) next eigenvalue, on top
of what the moment had left out already. Cost O(d_in³) full, O(m² d_in) for a factor of m rows.

This is no differential privacy: the rows were not clipped, so one sample can change `S` by any
amount and no σ bounds what it reveals; `e` and the counts of rows and samples are given as
they are; and nobody accounts for what else was published of the same data. The noise blurs, and
that is all that is claimed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import StatisticsError
from orthomerge.moments import Moment, RowMoment

Normal = Callable[..., Tensor]


def published(
    moments: Mapping[str, Moment], directions: int, noise: float, seed: int | None
) -> dict[str, Moment]:
    """The top `directions` of every moment, with noise as the module says.

    Raises:
        StatisticsError: fewer than one direction or more than a moment is wide, or noise that is
            negative or not finite.
    """
    if not (noise >= 0 and math.isfinite(noise)):
        raise StatisticsError(f"noise is not negative and finite, not {noise}: 0 adds none.")
    normal = normal_source(seed)
    found: dict[str, Moment] = {}
    for lead, moment in moments.items():
        if not 1 <= directions <= moment.dim:
            raise StatisticsError(
                f"{directions} directions of layer '{lead}' cannot be published: it has "
                f"{moment.dim} inputs, so choose from 1 to {moment.dim}."
            )
        found[lead] = _top(moment, directions, noise, normal)
    return found


def _top(moment: Moment, directions: int, noise: float, normal: Normal) -> RowMoment:
    energy = moment.trace / moment.dim
    rows, left = moment.factor, moment.slack
    if rows is None:
        values, vectors = linalg.eigh(_noisy(moment.matrix, noise * energy, normal))
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        kept = (vectors[:, :directions] * values[:directions].sqrt()).T
        rest = float(values[directions]) if directions < len(values) else 0.0
    else:
        values, turned = _principal(rows)
        kept = turned[:directions]
        kept = kept + noise * energy**0.5 * normal(*kept.shape).to(kept)
        rest = float(values[directions]) if directions < len(values) else 0.0
        rest = max(rest + noise * energy * float(normal(1)), 0.0)
    slack = None if left is None else left + rest
    return RowMoment.from_factor(kept, moment.count, exact=False, slack=slack)


def _noisy(matrix: Tensor, size: float, normal: Normal) -> Tensor:
    """`S + N`, `N` symmetric with entries `N(0, size²)`."""
    if not size:
        return matrix
    dim = len(matrix)
    row, column = torch.triu_indices(dim, dim)
    drawn = torch.zeros_like(matrix)
    drawn[row, column] = normal(len(row)).to(matrix) * size
    return matrix + drawn + torch.triu(drawn, 1).T


def _principal(
    rows: Float[Tensor, "m d_in"],
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m d_in"]]:
    """Descending eigenvalues of `RᵀR` and its scaled directions `√λ_i v_i`; O(m² d_in)."""
    values, vectors = linalg.eigh(rows @ rows.T)
    return values.flip(0).clamp_min(0.0), vectors.flip(1).T @ rows


def normal_source(seed: int | None) -> Normal:
    """Draws of standard normal float64 tensors of a given shape.

    Without a seed every bit comes from the operating system: a generator of 32 or 64 bits of state
    could be searched through, and its noise taken off again.
    """
    generator = None if seed is None else np.random.default_rng(seed)

    def draw(*shape: int) -> Tensor:
        size = 8 * math.prod(shape)
        bits = os.urandom(size) if generator is None else generator.bytes(size)
        numbers = np.frombuffer(bits, dtype=np.uint64) >> 11
        uniform = torch.from_numpy((numbers.astype(np.float64) + 0.5) * 2.0**-53)
        return cast(Tensor, torch.special.ndtri(uniform)).reshape(shape)

    return draw
