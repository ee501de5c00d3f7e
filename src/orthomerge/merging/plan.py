"""How a merge will be done: what was asked for is checked, then a layer is worked out at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors, truncate_measured
from orthomerge.merging.config import AUTO, SUM, MergeConfig
from orthomerge.merging.merged import MergedLayer
from orthomerge.merging.parts.lowrank import truncate_dense, truncate_nearly, truncate_to_energy
from orthomerge.merging.parts.options import LayerProblem
from orthomerge.merging.registry import PerTask, Truncated, Update, get_method
from orthomerge.moments import Moment


class HasMoments(Protocol):
    """Statistics of a task, as `orthomerge.statistics.Statistics`: a moment for every layer."""

    def moment(self, layer: str) -> Moment:
        """The moment of a layer's input."""
        ...


SMALL = 2**20
"""Entries of a layer that one thread merges: of fewer, a second one mostly waits, and waiting costs
as much processor time as work."""


def layer_seed(seed: int, layer: str) -> int:
    """The seed of one layer's generator: 63 bits of SHA-256 of the seed and the layer's name.

    It depends on nothing else, so a layer's draws do not depend on which other layers exist.
    """
    digest = hashlib.sha256(f"{seed}\0{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def plan_merge(
    adapters: Sequence[Mapping[str, LoraFactors]],
    config: MergeConfig | None = None,
    *,
    statistics: Sequence[HasMoments] | None = None,
    fisher: Sequence[Mapping[str, Tensor]] | None = None,
    **asked: Any,
) -> MergePlan:
    """A merge that was found to be well defined and whose layers are merged when asked for.

    For those who write layers in an order of their own, as the shards of a full model. Arguments
    and errors are those of `iter_merge`; what concerns one layer is found when it is merged.
    """
    return MergePlan(adapters, MergeConfig.of(config, **asked), statistics, fisher)


class MergePlan:
    """A merge that was found to be well defined, and how one layer of it is done.

    `names` are the layers, the union over the adapters; `config` has the weight of every adapter.
    Made by `plan_merge`.
    """

    def __init__(
        self,
        adapters: Sequence[Mapping[str, LoraFactors]],
        config: MergeConfig,
        statistics: Sequence[HasMoments] | None,
        fisher: Sequence[Mapping[str, Tensor]] | None,
    ) -> None:
        self.names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
        if not self.names:
            raise MergeError("there is nothing to merge: give at least one adapter with a layer.")
        config = replace(config, weights=config.spread(len(adapters)))
        self.config, self._method = config, get_method(config.method)
        self._adapters, self._options = adapters, config.arguments
        self._cuts = "rank" in self._method.options
        if self._cuts:
            self._options["rank"] = config.rank if isinstance(config.rank, int) else None
        self._weights = config.spread(len(adapters))
        self._by_layer = config.by_layer(len(adapters), self.names)
        self._statistics = _needed(
            config, "moments", statistics, len(adapters), "give each adapter's statistics file"
        )
        self._fisher = _needed(
            config, "fisher", fisher, len(adapters), "give each adapter's Fisher file"
        )
        self._survey = self._method.survey
        self._over_model: Tensor | None = None
        self._surveying = Lock()

    def merge(self, name: str, device: str | None = None) -> MergedLayer:
        """One layer, worked out on `device` (where it is, for None)."""
        factors, dtype, home = _gather(name, self._adapters)
        if device is not None:
            factors = [f.to(device) for f in factors]
        given: dict[str, Any] = {}
        if self._method.random:
            given["generator"] = torch.Generator().manual_seed(layer_seed(self.config.seed, name))
        if self._statistics is not None:
            given["moments"] = [s.moment(name).to(factors[0].A.device) for s in self._statistics]
        if self._fisher is not None:
            given["fisher"] = [_fisher_of(f, name, factors[0]) for f in self._fisher]
        if self._survey is not None:
            given["over_model"] = partial(self._surveyed, device)
        if self._cuts and self.config.rank == AUTO:  # it is cut by its energy, and only then
            given["rank"] = max(sum(f.rank for f in factors), 1)
        weights = self._by_layer.get(name, self._weights)
        try:
            with _threads_for(factors[0]):
                result = self._method.function(factors, list(weights), **{**self._options, **given})
                update, tasks, error = self._parted(result, factors)
        except LayerProblem as problem:
            raise MergeError(f"layer '{name}': {problem}") from problem
        except linalg.LinAlgError as problem:
            raise MergeError(
                f"layer '{name}' cannot be decomposed: its values are too large for the weights "
                "and options given; lower them."
            ) from problem
        update, *rest = [u.to(home, dtype) for u in (update, *tasks)]
        if not all(_finite(u) for u in (update, *rest)):
            raise MergeError(
                f"layer '{name}' merges to values larger than {str(dtype)[6:]} holds: lower the "
                "weights, or check where the adapters are from."
            )
        return MergedLayer(name, update, tuple(rest), error)

    def _surveyed(self, device: str | None) -> Tensor:
        """What the method's survey finds in all layers together, added up in their order once."""
        assert self._survey is not None
        with self._surveying:
            if self._over_model is None:
                total = torch.zeros((), dtype=torch.float64)
                for name in self.names:
                    factors = _gather(name, self._adapters)[0]
                    if device is not None:
                        factors = [f.to(device) for f in factors]
                    weights = self._by_layer.get(name, self._weights)
                    total = total + self._survey(factors, weights).double().cpu()
                self._over_model = total
            return self._over_model

    def _parted(
        self, result: Update | PerTask | Truncated, factors: Sequence[LoraFactors]
    ) -> tuple[Update, tuple[Update, ...], float | None]:
        """What a method gave, at most of the rank that was asked for, and what that cost."""
        tasks: tuple[Update, ...] = ()
        error: float | None = None
        if isinstance(result, PerTask):
            tasks, update = tuple(result.tasks), result.shared
        elif isinstance(result, Truncated):
            update, error = result.update, result.error
        else:
            update = result
        rank, energy = self.config.rank, self.config.energy
        if energy is not None:
            update, error = truncate_to_energy(update, energy)
            tasks = tuple(truncate_to_energy(own, energy)[0] for own in tasks)
        elif rank == SUM:
            update, error = _cut_dense(update, factors, error)
            tasks = tuple(_cut_dense(own, factors, None)[0] for own in tasks)
        elif isinstance(rank, int) and not self._cuts:
            update, error = _cut(update, rank)
            tasks = tuple(_cut(own, rank)[0] for own in tasks)
        return update, tasks, error


@contextmanager
def _threads_for(factors: LoraFactors) -> Generator[None, None, None]:
    """One thread for a small layer, unless the user has said how many (OMP_NUM_THREADS)."""
    before = torch.get_num_threads()
    if before == 1 or math.prod(factors.shape) > SMALL or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _needed(
    config: MergeConfig, what: str, given: Sequence[Any] | None, count: int, way: str
) -> Sequence[Any] | None:
    """What the method needs, one an adapter; None where it does not need it."""
    if what not in config.needs:
        return None
    if given is None:
        kind = "statistics" if what == "moments" else "Fisher information"
        raise MergeError(f"the method '{config.method}' needs {kind}: {way}, in order.")
    if len(given) != count:
        raise MergeError(
            f"{len(given)} of {what} for {count} adapters: {way}, in the order of the adapters."
        )
    return given


def _fisher_of(by_layer: Mapping[str, Tensor], name: str, like: LoraFactors) -> Tensor:
    """One adapter's Fisher information of a layer, in float32 or better."""
    if name not in by_layer:
        raise MergeError(f"no Fisher information for layer '{name}': collect it on this adapter.")
    value = by_layer[name]
    if tuple(value.shape) != like.shape:
        raise MergeError(
            f"the Fisher information of layer '{name}' is {list(value.shape)}, the update "
            f"{list(like.shape)}: it belongs to another model."
        )
    if not bool(value.isfinite().all()) or bool((value < 0).any()):
        raise MergeError(
            f"the Fisher information of layer '{name}' has values that are negative or not finite."
        )
    return value.to(like.A)


def _gather(
    name: str, adapters: Sequence[Mapping[str, LoraFactors]]
) -> tuple[list[LoraFactors], torch.dtype, torch.device]:
    """One layer's factors in float32 or better, absent ones of rank 0; dtype and device to return.

    Every adapter is asked for the layer once: a lazy one reads it from its file.
    """
    found = [adapter.get(name) for adapter in adapters]
    present = [factors for factors in found if factors is not None]
    first = present[0]
    tensors = [tensor for factors in present for tensor in (factors.A, factors.B)]
    for factors in present:
        if factors.shape != first.shape:
            raise MergeError(
                f"layer '{name}' is {list(first.shape)} in one adapter and "
                f"{list(factors.shape)} in another: merge adapters of the same base model."
            )
    devices = list(dict.fromkeys(str(tensor.device) for tensor in tensors))
    if len(devices) > 1:
        raise MergeError(
            f"layer '{name}' is on {' and '.join(devices)}: move the adapters to one device."
        )
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    working = torch.promote_types(dtype, torch.float32)
    d_out, d_in = first.shape
    absent = LoraFactors(first.A.new_zeros(0, d_in), first.B.new_zeros(d_out, 0))
    wide = [(f or absent).to(working) for f in found]
    if not all(_finite(f) for f in wide):
        raise MergeError(f"layer '{name}' has values that are not finite: check its training.")
    return wide, dtype, first.A.device


def _finite(update: Update) -> bool:
    """Whether all values are; one sum shows it, unless it overflows."""
    if isinstance(update, LoraFactors):
        parts = (update.A, update.B)
        if not math.isfinite(update.scaling):
            return False
    else:
        parts = (update,)
    return all(bool(p.sum().isfinite()) or bool(p.isfinite().all()) for p in parts)


def _cut(update: Update, rank: int) -> tuple[LoraFactors, float]:
    """The best approximation of rank at most `rank`, and the share of the norm that was lost."""
    if isinstance(update, LoraFactors):
        return (update, 0.0) if update.rank <= rank else truncate_measured(update, rank)
    return truncate_dense(update, rank)


def _cut_dense(
    update: Update, factors: Sequence[LoraFactors], error: float | None
) -> tuple[Update, float | None]:
    """A dense update cut to the sum of the ranks where that is smaller; factors as they are."""
    rank = max(sum(f.rank for f in factors), 1)
    if isinstance(update, LoraFactors) or rank >= min(update.shape):
        return update, error
    return truncate_nearly(update, rank, factors)
