"""The layers LoRA can adapt, by the names that do not depend on the head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import cast

from torch import nn

from orthomerge.errors import UnknownNameError, nearest
from orthomerge.models.modules import is_transposed

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


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The layers whose name ends in one of `targets`, matched as PEFT's `target_modules` are.

    "all-linear" stands for all of them.

    Raises:
        UnknownNameError: a target matches no layer; the message names the model's linear layers.
    """
    layers = linear_layers(model)
    if ALL in targets:
        return layers
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        hits = {n: m for n, m in layers.items() if n == target or n.endswith(f".{target}")}
        if not hits:
            ends = sorted({n.rsplit(".", 1)[-1] for n in layers})
            full = sorted({re.sub(r"\.\d+\.", ".*.", n) for n in layers})
            close = nearest(target, ends)
            hint = f"did you mean '{close}'? " if close else ""
            raise UnknownNameError(
                f"no layer '{target}' in {type(model).__name__}: {hint}its linear layers are "
                f"{', '.join(full)}."
            )
        chosen.update(hits)
    order = list(layers)
    return dict(sorted(chosen.items(), key=lambda item: order.index(item[0])))


def target_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The targets as a file names them: "all-linear" by the ends of all the layers' names."""
    if ALL not in targets:
        return list(targets)
    return sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
