"""How a merge will be done: what was asked for is checked, then a layer is worked out at a time."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from orthomerge import linalg
from orthomerge.errors import MergeError, unknown_name
from orthomerge.factors import LoraFactors, truncate_measured
from orthomerge.merging.merged import MergedLayer
from orthomerge.merging.parts.lowrank import truncate_dense
from orthomerge.merging.parts.options import LayerProblem, check_rank
from orthomerge.merging.registry import MergeMethod, PerTask, Truncated, Update, get_method
from orthomerge.moments import Moment

LayerWeights = Mapping[str, Sequence[float] | float]
"""Weights of the layers whose name a regular expression matches (`re.search`), first match."""


class HasMoments(Protocol):
    """Statistics of a task, as `orthomerge.statistics.Statistics`: a moment for every layer."""

    def moment(self, layer: str) -> Moment:
        """The moment of a layer's input."""
        ...


def layer_seed(seed: int, layer: str) -> int:
    """The seed of one layer's generator: 63 bits of SHA-256 of the seed and the layer's name.

    It depends on nothing else, so a layer's draws do not depend on which other layers exist.
    """
    digest = hashlib.sha256(f"{seed}\0{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def plan_merge(
    adapters: Sequence[Mapping[str, LoraFactors]],
    *,
    method: str = "linear",
    weights: Sequence[float] | float | None = None,
    layer_weights: LayerWeights | None = None,
    seed: int = 0,
    rank: int | None = None,
    statistics: Sequence[HasMoments] | None = None,
    fisher: Sequence[Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> MergePlan:
    """A merge that was found to be well defined and whose layers are worked out when asked for.

    For those who write layers in an order of their own, as the shards of a full model. Arguments
    and errors as of `iter_merge`; what concerns one layer is found when it is merged.
    """
    return MergePlan(
        adapters, get_method(method), _weights(weights, len(adapters)), layer_weights or {},
        seed, rank, statistics, fisher, options,
    )  # fmt: skip


class MergePlan:
    """A merge that was found to be well defined, and how one layer of it is done.

    `names` are the layers, the union over the adapters. Made by `plan_merge`.
    """

    def __init__(
        self,
        adapters: Sequence[Mapping[str, LoraFactors]],
        method: MergeMethod,
        weights: list[float],
        layer_weights: LayerWeights,
        seed: int,
        rank: int | None,
        statistics: Sequence[HasMoments] | None,
        fisher: Sequence[Mapping[str, Tensor]] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
        if not self.names:
            raise MergeError("there is nothing to merge: give at least one adapter with a layer.")
        check_rank("rank", rank)
        self._adapters, self._method, self._seed, self._rank = adapters, method, seed, rank
        self._options = _options(method, options)
        self._cuts = "rank" in method.options
        if self._cuts:
            self._options["rank"] = rank
        self._by_layer = _layer_weights(layer_weights, len(adapters), self.names)
        self._weights = weights
        self._statistics = _needed(
            method, "moments", statistics, len(adapters), "give each adapter's statistics file"
        )
        self._fisher = _needed(
            method, "fisher", fisher, len(adapters), "give each adapter's Fisher file"
        )

    def merge(self, name: str, device: str | None = None) -> MergedLayer:
        """One layer, worked out on `device` (where it is, for None)."""
        factors, dtype, home = _gather(name, self._adapters)
        if device is not None:
            factors = [f.to(device) for f in factors]
        given: dict[str, Any] = {}
        if self._method.random:
            given["generator"] = torch.Generator().manual_seed(layer_seed(self._seed, name))
        if self._statistics is not None:
            given["moments"] = [s.moment(name).to(factors[0].A.device) for s in self._statistics]
        if self._fisher is not None:
            given["fisher"] = [_fisher_of(f, name, factors[0]) for f in self._fisher]
        weights = self._by_layer.get(name, self._weights)
        try:
            result = self._method.function(factors, list(weights), **self._options, **given)
            update, tasks, error = self._parted(result)
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

    def _parted(
        self, result: Update | PerTask | Truncated
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
        if self._rank is not None and not self._cuts:
            update, error = _cut(update, self._rank)
            tasks = tuple(_cut(own, self._rank)[0] for own in tasks)
        return update, tasks, error


def _options(method: MergeMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their Python names, each one the method has."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = "lambda_" if key == "lambda" else key
        if name not in method.options and not method.open_options:
            raise unknown_name(
                "option",
                key,
                method.options,
                where=f"the method '{method.name}'",
                error=MergeError,
            )
        if name in values:
            raise MergeError("options 'lambda' and 'lambda_' are the same: give one of them.")
        values[name] = value
    return values


def _weights(weights: Sequence[float] | float | None, count: int, what: str = "") -> list[float]:
    """One finite weight an adapter."""
    if weights is None:
        weights = 1.0
    if isinstance(weights, int | float):
        weights = [weights] * count
    if len(weights) != count:
        raise MergeError(
            f"{len(weights)} weights{what} for {count} adapters: give one weight for each adapter, "
            "or a single number."
        )
    for number, weight in enumerate(weights, start=1):
        if not math.isfinite(weight):
            raise MergeError(
                f"the weight{what} of adapter {number} is {weight}: it must be finite."
            )
    return [float(weight) for weight in weights]


def _layer_weights(given: LayerWeights, count: int, names: Sequence[str]) -> dict[str, list[float]]:
    """The weights of each layer that an expression matches; the first that does decides."""
    found: dict[str, list[float]] = {}
    for expression, weights in given.items():
        values = _weights(weights, count, f" of layers '{expression}'")
        try:
            matched = [name for name in names if re.search(expression, name)]
        except re.error as problem:
            raise MergeError(
                f"'{expression}' is not a regular expression ({problem}): give one that finds "
                "layer names, as 'layer\\.[0-5]\\.'."
            ) from problem
        if not matched:
            raise MergeError(f"no layer matches '{expression}': layers are named as '{names[0]}'.")
        for name in matched:
            found.setdefault(name, values)
    return found


def _needed(
    method: MergeMethod, what: str, given: Sequence[Any] | None, count: int, way: str
) -> Sequence[Any] | None:
    """What the method needs, one an adapter; None where it does not need it."""
    if what not in method.needs:
        return None
    if given is None:
        kind = "statistics" if what == "moments" else "Fisher information"
        raise MergeError(f"the method '{method.name}' needs {kind}: {way}, in order.")
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
            f"layer '{name}' lies on {' and '.join(devices)}: move the adapters to one device."
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
    """Whether all values are; one sum tells, unless it overflows."""
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
