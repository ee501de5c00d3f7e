"""Interference between adapters, from their factors and the tasks' statistics alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.adapters import Adapter
from orthomerge.diagnostics.couplings import Couplings, couplings
from orthomerge.statistics import Statistics


class Interference(NamedTuple):
    """How much adapter i disturbs task j, relative to what task j's own adapter does there.

    `matrix[i, j] = I[i→j]` over all layers, `layers` the same for each layer; the diagonal is 1.
    Rows are adapters, columns tasks, both in the order given; `names` are the adapters'.
    """

    names: list[str]
    matrix: Float[Tensor, "adapters tasks"]
    layers: dict[str, Float[Tensor, "adapters tasks"]]


def interference(
    adapters: Sequence[str | Path | Adapter], statistics: Sequence[str | Path | Statistics]
) -> Interference:
    """How much each adapter disturbs each task, per layer and over all layers.

    `I[i→j] = sqrt(tr(ΔW_i S_j ΔW_iᵀ) / tr(ΔW_j S_j ΔW_jᵀ))`.

    Statistics are in the order of the adapters, one per task. Over all layers, energies are summed
    before the quotient. A layer where task j's own adapter does nothing gives infinity where
    another one does. Cost: that of `couplings`.

    Raises:
        StatisticsError: not one statistics an adapter, or a layer without statistics.
        AdapterError: unreadable adapters, or adapters of different base models.
    """
    return interference_of(couplings(adapters, statistics))


def interference_of(found: Couplings) -> Interference:
    """The interference that couplings hold."""
    layers = {name: _relative(K) for name, K in found.layers.items()}
    return Interference(found.names, _relative(found.total), layers)


def _relative(K: Float[Tensor, "tasks adapters adapters"]) -> Float[Tensor, "adapters tasks"]:
    energies = torch.diagonal(K, dim1=1, dim2=2).T.clamp(min=0)
    quotient = energies / torch.diagonal(energies)
    return torch.where(
        energies == 0, torch.zeros_like(energies), quotient.nan_to_num(posinf=math.inf)
    ).sqrt()
