"""What every pair of adapters puts on every task's inputs: the figures all others follow from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.adapters import (
    Adapter,
    align_adapters,
    of_one_model,
    read_adapter,
    require_finite,
)
from orthomerge.errors import StatisticsError
from orthomerge.factors import LoraFactors
from orthomerge.moments import Moment
from orthomerge.statistics import Statistics


class Couplings(NamedTuple):
    """`K[t, i, j] = tr(ΔW_i S_t ΔW_jᵀ)` of every layer: how outputs go together on a task's inputs.

    `K[t, i, i]` is the output energy of adapter i on task t. Whatever is linear in the updates
    follows from K: interference, and the outputs of any weighted sum. `names` are the adapters',
    in order, and the tasks' are in the same order.
    """

    names: list[str]
    layers: dict[str, Float[Tensor, "tasks adapters adapters"]]

    @property
    def total(self) -> Float[Tensor, "tasks adapters adapters"]:
        """The sum over the layers."""
        return torch.stack(list(self.layers.values())).sum(dim=0)


def couplings(
    adapters: Sequence[str | Path | Adapter], statistics: Sequence[str | Path | Statistics]
) -> Couplings:
    """Every adapter against every other on every task's inputs, from factors and statistics alone.

    Statistics are in the order of the adapters, one per task. Per layer, with the factors stacked,
    `K_t = (A S_t Aᵀ) ∘ (Bᵀ B)` summed over blocks: O(T L Nr d_in² + L (Nr)² d_out) in float64.

    Raises:
        StatisticsError: not one statistics an adapter, or a layer without statistics.
        AdapterError: unreadable adapters, or adapters of different base models.
    """
    read = read_all(adapters)
    stats = matched(statistics, read)
    names = sorted({layer for a in read for layer in a.layers})
    layers = {}
    for layer in names:
        held = {i: a.layers[layer] for i, a in enumerate(read) if layer in a.layers}
        layers[layer] = _layer(held, len(read), [s.moment(layer) for s in stats])
    return Couplings([a.name for a in read], layers)


def read_all(adapters: Sequence[str | Path | Adapter], *, base: str | None = None) -> list[Adapter]:
    """The adapters, read where they are folders, all of one base model: `base`, where it is given.

    Raises:
        AdapterError: unreadable adapters, adapters of different base models, or values that are
            not finite.
    """
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=base) for a in adapters]
    read = align_adapters(read, base=base)
    if base:  # asked again below, they are of one base
        named = {"base_model_name_or_path": base, "revision": None}
        read = [replace(a, config={**a.config, **named}) for a in read]
    for adapter in read:
        if adapter.path is None:  # those of files are held to it when a layer is read
            for name, factors in adapter.layers.items():
                for tensor in (factors.A, factors.B):
                    require_finite(tensor, f"layer '{name}'", adapter.called)
    return read


def matched(
    statistics: Sequence[str | Path | Statistics], adapters: Sequence[Adapter]
) -> list[Statistics]:
    """The statistics, read where they are files, one an adapter and all of one model.

    Raises:
        StatisticsError: not one an adapter, or of another model.
    """
    if len(adapters) != len(statistics):
        raise StatisticsError(
            f"{len(adapters)} adapters and {len(statistics)} statistics: give one statistics file "
            "an adapter, in the same order."
        )
    return of_one_model(statistics, adapters)


def _layer(held: dict[int, LoraFactors], size: int, moments: Sequence[Moment]) -> Tensor:
    A, B, owner = stacked(list(held.values()))
    of = torch.tensor(list(held))[owner]
    outputs = B.T @ B
    found = torch.zeros(len(moments), size, size, dtype=torch.float64)
    for t, moment in enumerate(moments):
        found[t] = sum_blocks(moment.quadratic(A) * outputs, of, size)
    return found


def stacked(factors: Sequence[LoraFactors]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of every A, columns of every B times its scaling, and which one each belongs to."""
    A = torch.cat([f.A.double() for f in factors])
    B = torch.cat([f.scaling * f.B.double() for f in factors], dim=1)
    owner = torch.cat([torch.full((f.rank,), i) for i, f in enumerate(factors)])
    return A, B, owner


def sum_blocks(
    matrix: Float[Tensor, "R R"], owner: Tensor, size: int
) -> Float[Tensor, "size size"]:
    """The sums of the blocks of `matrix` whose rows and columns belong together."""
    rows = torch.zeros(size, matrix.shape[1], dtype=matrix.dtype).index_add_(0, owner, matrix)
    return torch.zeros(size, size, dtype=matrix.dtype).index_add_(1, owner, rows)
