"""The layers LoRA can adapt, by the names that do not depend on the head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from orthomerge.errors import UnknownNameError, nearest
from orthomerge.models.modules import is_transposed
from orthomerge.statistics.experts import Expert, expert_tensors, experts_of

ALL = "all-linear"
"""PEFT's name for every layer of the backbone that LoRA can adapt."""


def backbone(model: nn.Module) -> nn.Module:
    """The model below its head, so that a layer has one name whatever head is on top."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return getattr(inner, "base_model", inner)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the backbone that LoRA can adapt, `nn.Linear` and GPT-2's `Conv1D`, by name."""
    found: dict[str, nn.Module] = {}
    named = cast(Iterable[tuple[str, nn.Module]], backbone(model).named_modules())
    for name, module in named:
        base: nn.Module = getattr(module, "base_layer", module)
        if (name and isinstance(base, nn.Linear)) or is_transposed(base):
            found[name.removesuffix(".base_layer")] = module
    return {n: m for n, m in found.items() if ".lora_" not in n}


def layer_shape(layer: nn.Module | Expert) -> tuple[int, int]:
    """What a layer puts out and reads: (d_out, d_in)."""
    if isinstance(layer, Expert):
        return layer.outputs, layer.width
    first, second = cast(Tensor, layer.weight).shape
    return (second, first) if is_transposed(layer) else (first, second)


def split_targets(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """The targets that name linear layers, PEFT's `target_modules`, and its `target_parameters`.

    Those are the targets that name no linear layer but tensors of experts.
    """
    linear = [t for t in targets if t == ALL or _ending(linear_layers(model), t)]
    return linear, [t for t in targets if t not in linear]


def _ending(names: Iterable[str], target: str) -> list[str]:
    return [n for n in names if n == target or n.endswith(f".{target}")]


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module | Expert]:
    """The layers whose name ends in one of `targets`, matched as PEFT's `target_modules` are.

    "all-linear" stands for all linear ones. A target that names none of them may name tensors of
    experts, as PEFT's `target_parameters` do: each expert is a layer.

    Raises:
        UnknownNameError: a target matches no layer; the message names the model's linear layers.
    """
    layers = linear_layers(model)
    chosen: dict[str, nn.Module | Expert] = {}
    tensors = expert_tensors(backbone(model))
    experts: dict[str, nn.Module | Expert] = {}
    for target in targets:
        hits = {n: layers[n] for n in ([*layers] if target == ALL else _ending(layers, target))}
        if not hits and (of_experts := _ending(tensors, target)):
            experts |= {k: e for n in of_experts for k, e in experts_of(n, *tensors[n]).items()}
            continue
        if not hits:
            ends = sorted({n.rsplit(".", 1)[-1] for n in layers})
            full = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in layers})
            packed = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in tensors})
            close = nearest(target, ends)
            hint = f"did you mean '{close}'? " if close else ""
            raise UnknownNameError(
                f"no layer '{target}' in {type(model).__name__}: {hint}its linear layers are "
                f"{', '.join(full + packed)}."
            )
        chosen.update(hits)
    order = list(layers)
    return dict(sorted(chosen.items(), key=lambda item: order.index(item[0]))) | experts


def target_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The targets as a file names them: "all-linear" by the ends of all the layers' names."""
    if ALL not in targets:
        return list(targets)
    ends = {name.rsplit(".", 1)[-1] for name in linear_layers(model)}
    return sorted(ends | set(split_targets(model, targets)[1]))
