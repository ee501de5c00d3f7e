"""Merge whole adapters, layer by layer, by one registered method."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.errors import MergeError, unknown_name
from orthomerge.factors import LoraFactors, from_dense, truncate, weighted_sum
from orthomerge.merging.parts.options import LayerProblem, check_rank
from orthomerge.merging.registry import MergeMethod, get_method


@dataclass(frozen=True)
class MergedUpdate:
    """The merged update of every layer: factors where the method keeps them, else dense.

    `truncation_error` is `‖merged - truncated‖_F / ‖merged‖_F` of each layer, where a rank was
    asked for or the method itself truncates; otherwise it is empty.
    """

    layers: dict[str, LoraFactors | Tensor]
    method: str
    truncation_error: dict[str, float] = field(default_factory=dict)

    def dense(self, layer: str) -> Float[Tensor, "d_out d_in"]:
        """The dense update of one layer. O(d_out · rank · d_in) for factors.

        Raises:
            MergeError: no such layer; the message names the nearest.
        """
        if layer not in self.layers:
            raise unknown_name("layer", layer, self.layers, error=MergeError)
        return _dense(self.layers[layer])


def layer_seed(seed: int, layer: str) -> int:
    """The seed of one layer's generator: 63 bits of SHA-256 of the seed and the layer's name.

    It depends on nothing else, so a layer's draws do not depend on which other layers exist.
    """
    digest = hashlib.sha256(f"{seed}\0{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def merge_layers(
    adapters: Sequence[Mapping[str, LoraFactors]],
    *,
    method: str = "linear",
    weights: Sequence[float] | float | None = None,
    seed: int = 0,
    rank: int | None = None,
    **options: Any,
) -> MergedUpdate:
    """Merge N adapters, each a mapping from layer name to factors, by a registered method.

    `W_merged[layer] = method([ΔW_1[layer], ..., ΔW_N[layer]], weights)` for the union of the layer
    names; a layer that an adapter lacks counts as a zero update there. `weights` is 1.0 for every
    adapter when None (a sum, not a mean), one number for all, or one a adapter. `rank` truncates
    every result to its best approximation of that rank, with the error recorded. A method with
    randomness gets a CPU generator seeded by `layer_seed(seed, layer)`. Options named lambda in
    the papers are `lambda_`; the key "lambda" is accepted too.

    Computed in float32 or better; results have the adapters' dtype and device. Cost: the method's,
    a layer; truncating factors O((d_in + d_out) R² + R³), a dense result O(d_out d_in min(d)).

    Raises:
        UnknownNameError: no such method.
        MergeError: no adapters; weights that do not match; an unknown option or a bad value;
            layers whose shapes or devices differ; factors that are not finite.
    """
    chosen = get_method(method)
    values = _options(chosen, options)
    check_rank("rank", rank)
    if "rank" in chosen.options:
        values["rank"] = rank
    scales = _weights(weights, len(adapters))
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    if not names:
        raise MergeError("there is nothing to merge: give at least one adapter with a layer.")

    layers: dict[str, LoraFactors | Tensor] = {}
    errors: dict[str, float] = {}
    for name in names:
        factors, dtype = _gather(name, adapters)
        if chosen.random:
            generator = torch.Generator().manual_seed(layer_seed(seed, name))
            values["generator"] = generator
        try:
            merged = chosen.function(factors, scales, **values)
        except LayerProblem as problem:
            raise MergeError(f"layer '{name}': {problem}") from problem
        if "rank" in chosen.options:  # the method is itself the truncation of the exact sum
            errors[name] = _relative_error(weighted_sum(factors, scales), merged)
        elif rank is not None:
            whole, merged = merged, _truncate(merged, rank)
            errors[name] = _relative_error(whole, merged)
        layers[name] = merged.to(dtype)
    return MergedUpdate(layers, method, errors)


def _options(method: MergeMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their Python names, each one the method has."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = "lambda_" if key == "lambda" else key
        if name not in method.options:
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


def _weights(weights: Sequence[float] | float | None, count: int) -> list[float]:
    """One finite weight an adapter."""
    if weights is None:
        weights = 1.0
    if isinstance(weights, int | float):
        weights = [weights] * count
    if len(weights) != count:
        raise MergeError(
            f"{len(weights)} weights for {count} adapters: give one weight for each adapter, "
            "or a single number."
        )
    for number, weight in enumerate(weights, start=1):
        if not math.isfinite(weight):
            raise MergeError(f"the weight of adapter {number} is {weight}: it must be finite.")
    return [float(weight) for weight in weights]


def _gather(
    name: str, adapters: Sequence[Mapping[str, LoraFactors]]
) -> tuple[list[LoraFactors], torch.dtype]:
    """One layer's factors in float32 or better, absent ones of rank 0, and the dtype to return."""
    first = next(adapter[name] for adapter in adapters if name in adapter)
    present = [adapter[name] for adapter in adapters if name in adapter]
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
    if not all(tensor.isfinite().all() for tensor in tensors) or not all(
        math.isfinite(factors.scaling) for factors in present
    ):
        raise MergeError(f"layer '{name}' has values that are not finite: check its training.")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    working = torch.promote_types(dtype, torch.float32)
    d_out, d_in = first.shape
    absent = LoraFactors(first.A.new_zeros(0, d_in), first.B.new_zeros(d_out, 0))
    return [adapter.get(name, absent).to(working) for adapter in adapters], dtype


def _dense(update: LoraFactors | Tensor) -> Tensor:
    return update.delta() if isinstance(update, LoraFactors) else update


def _truncate(update: LoraFactors | Tensor, rank: int) -> LoraFactors:
    if isinstance(update, LoraFactors):
        return update if update.rank <= rank else truncate(update, rank)
    return from_dense(update, rank)


def _relative_error(whole: LoraFactors | Tensor, part: LoraFactors | Tensor) -> float:
    """`‖whole - part‖_F / ‖whole‖_F` in float64, without a dense matrix where both are factors."""
    if whole is part:
        return 0.0
    if isinstance(whole, LoraFactors) and isinstance(part, LoraFactors):
        norm, rest = _norm(whole), _norm(weighted_sum([_double(whole), _double(part)], [1.0, -1.0]))
    else:
        exact = _dense(whole).double()
        norm, rest = float(exact.norm()), float((exact - _dense(part).double()).norm())
    return rest / norm if norm else 0.0


def _double(factors: LoraFactors) -> LoraFactors:
    return factors.to(torch.float64)


def _norm(factors: LoraFactors) -> float:
    """`‖s B A‖_F = |s| ‖R_B R_Aᵀ‖_F` from thin QRs: no cancellation, unlike the inner product."""
    Rb = torch.linalg.qr(factors.B.double(), mode="r").R
    Ra = torch.linalg.qr(factors.A.double().T, mode="r").R
    return abs(factors.scaling) * float((Rb @ Ra.T).norm())
