"""Interference between adapters, from their factors and the tasks' statistics alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.adapters import Adapter, read_adapter, require_same_base
from orthomerge.errors import StatisticsError
from orthomerge.factors import energy
from orthomerge.features import Statistics


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

    Statistics are in the order of the adapters, one a task. Only products of small factors with
    `S_j` are formed: O(N² L rank d_in²). Over all layers, energies are summed before the quotient.
    A layer where task j's own adapter does nothing gives infinity where another one does.

    Raises:
        StatisticsError: not one statistics an adapter, or a layer without statistics.
        AdapterError: unreadable adapters, or adapters of different base models.
    """
    read = [a if isinstance(a, Adapter) else read_adapter(a) for a in adapters]
    stats = [s if isinstance(s, Statistics) else Statistics.load(s) for s in statistics]
    if len(read) != len(stats):
        raise StatisticsError(
            f"{len(read)} adapters and {len(stats)} statistics: give one statistics file an "
            "adapter, in the same order."
        )
    require_same_base(read)
    names = sorted({layer for a in read for layer in a.layers})
    size = len(read)
    layers: dict[str, Tensor] = {}
    total = torch.zeros(size, size, dtype=torch.float64)
    for layer in names:
        energies = torch.zeros(size, size, dtype=torch.float64)
        for j, item in enumerate(stats):
            moment = item.moment(layer)
            for i, adapter in enumerate(read):
                if layer in adapter.layers:
                    energies[i, j] = max(energy(adapter.layers[layer], moment), 0.0)
        total += energies
        layers[layer] = _relative(energies)
    return Interference([a.name for a in read], _relative(total), layers)


def _relative(energies: Tensor) -> Tensor:
    own = torch.diagonal(energies)
    quotient = energies / own
    return torch.where(
        energies == 0, torch.zeros_like(energies), quotient.nan_to_num(posinf=math.inf)
    ).sqrt()
