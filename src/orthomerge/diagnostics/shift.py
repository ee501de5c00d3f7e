"""What a merge will do to every task's outputs, predicted before anything is run.

At layer l, on task t's inputs, the merged update puts out a part along what the task's own adapter
puts out there and a part beside it. With `a = ‖ΔW_t H_tᵀ‖` and `⟨ΔW, ΔW_t⟩ = tr(ΔW S_t ΔW_tᵀ)`:

    along  = ⟨ΔW, ΔW_t⟩ / a                  (a: as much as alone)
    beside = sqrt(⟨ΔW, ΔW⟩ - along²)
    shift_t = Σ_l sqrt((a - along)² + (c · beside)²) / Σ_l a

With c = 1 each term is the distance of the outputs, `‖(ΔW - ΔW_t) H_tᵀ‖`. But most of what is
beside goes where the task's head does not look, while what is missing is missed whole: over the
merges of the offline suite the loss of accuracy follows the shift best at c near 0.4, and hardly at
c = 1 (`benchmarks/prediction.py`; figures in docs/diagnose.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.adapters import Adapter
from orthomerge.diagnostics.couplings import Couplings, matched, read_all, stacked, sum_blocks
from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import MergedLayer
from orthomerge.moments import Moment
from orthomerge.statistics import Statistics

BESIDE = 0.4
"""The weight c of the part beside; chosen on two arms of the study and held to the others."""


class Shift(NamedTuple):
    """The predicted change of every task's outputs under a merge; a total of 0 is none.

    `kept` is the part along the task's own outputs (1: as much as alone), `beside` what is put out
    beside them, both relative to the own outputs over all layers. `layers` are the terms of
    `total`, which add up to it; `mean` over the tasks is one figure for the merge.
    """

    kept: Float[Tensor, " tasks"]
    beside: Float[Tensor, " tasks"]
    total: Float[Tensor, " tasks"]
    layers: dict[str, Float[Tensor, " tasks"]]

    @property
    def mean(self) -> float:
        """The mean total over the tasks."""
        return float(self.total.mean())


Weights = Sequence[float] | Mapping[str, Sequence[float]]


def shift_of_sum(found: Couplings, weights: Weights) -> Shift:
    """The shift of the weighted sum `Σ_i w_i ΔW_i`, in closed form; weights may differ by layer.

    `tr(ΔW S_t ΔWᵀ) = wᵀ K_t w` and `tr(ΔW S_t ΔW_tᵀ) = (K_t w)_t`. O(L T N²).

    Raises:
        MergeError: weights that do not match the adapters or the layers.
    """
    size = len(found.names)
    by_layer = weights if isinstance(weights, Mapping) else dict.fromkeys(found.layers, weights)
    if set(by_layer) != set(found.layers) or any(len(w) != size for w in by_layer.values()):
        raise MergeError(f"weights do not match: give {size} numbers for each of the layers.")
    parts: dict[str, Tensor] = {}
    for layer, K in found.layers.items():
        w = torch.as_tensor(by_layer[layer], dtype=torch.float64)
        put_out = K @ w
        own = torch.diagonal(torch.diagonal(K, dim1=1, dim2=2))
        parts[layer] = torch.stack([own, torch.diagonal(put_out), put_out @ w])
    return _shift(parts)


def predict_shift(
    merged: Iterable[MergedLayer],
    adapters: Sequence[str | Path | Adapter],
    statistics: Sequence[str | Path | Statistics],
) -> Shift:
    """The shift of any merge, from its layers as `iter_merge` gives them, one at a time.

    Where the method leaves one update per task, each task is held to its own. O(T (R + r) d_in²) a
    layer where the merge is factors of rank R, O(T d_out d_in²) where it is dense.

    Raises:
        StatisticsError: not one statistics an adapter, or a layer without statistics.
        AdapterError: unreadable adapters, or adapters of different base models.
    """
    read = read_all(adapters)
    stats = matched(statistics, read)
    parts: dict[str, Tensor] = {}
    for layer in merged:
        tasks: list[Tensor] = []
        for t, (adapter, item) in enumerate(zip(read, stats, strict=True)):
            update = layer.tasks[t] if layer.tasks else layer.update
            own = adapter.layers.get(layer.name)
            tasks.append(_energies(update, own, item.moment(layer.name)))
        parts[layer.name] = torch.stack(tasks, dim=1)
    return _shift(parts)


def _energies(
    update: LoraFactors | Tensor, own: LoraFactors | None, moment: Moment
) -> Float[Tensor, " parts"]:
    """`tr(ΔW_t S ΔW_tᵀ)`, `tr(ΔW S ΔW_tᵀ)`, `tr(ΔW S ΔWᵀ)` of one layer."""
    if isinstance(update, LoraFactors):
        A, B, owner = stacked([update] if own is None else [update, own])
        blocks = sum_blocks(moment.quadratic(A) * (B.T @ B), owner, 2)
        return torch.stack([blocks[1, 1], blocks[0, 1], blocks[0, 0]])
    wide = update.double()
    put_out = moment.apply(wide.T)
    energy = (put_out.T * wide).sum()
    if own is None:
        return torch.stack([energy * 0, energy * 0, energy])
    A, B, _ = stacked([own])
    mine = (moment.quadratic(A) * (B.T @ B)).sum()
    return torch.stack([mine, ((A @ put_out).T * B).sum(), energy])


def _shift(parts: Mapping[str, Float[Tensor, "parts tasks"]]) -> Shift:
    """From own energy, product and merged energy of every layer; see the module's equations."""
    own, product, energy = torch.stack(list(parts.values())).unbind(dim=1)
    a = own.clamp(min=0).sqrt()
    along = torch.where(a > 0, product / a.clamp(min=torch.finfo(a.dtype).tiny), 0.0)
    beside = (energy.clamp(min=0) - along**2).clamp(min=0).sqrt()
    terms = ((a - along) ** 2 + (BESIDE * beside) ** 2).sqrt()
    whole = a.sum(dim=0)
    # A task whose adapter puts out nothing keeps all of it; whatever is beside is infinite there.
    silent = whole <= 0
    kept = torch.where(silent, 1.0, along.sum(dim=0) / whole)
    scaled = torch.where(terms > 0, terms / whole, 0.0)
    spread = torch.where(beside > 0, beside / whole, 0.0).sum(dim=0)
    return Shift(kept, spread, scaled.sum(dim=0), dict(zip(parts, scaled, strict=True)))
