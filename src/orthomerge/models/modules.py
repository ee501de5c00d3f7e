"""A loaded model and its parts: its layers by name, the mode it runs in, what it is given."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orthomerge.errors import AdapterError


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The layer that an adapter calls so.

    Raises:
        AdapterError: the model has no such layer.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as problem:
        raise AdapterError(
            f"the model has no layer '{name}': the adapter was made for another model."
        ) from problem


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as `[d_in, d_out]`: GPT-2's Conv1D does."""
    return type(layer).__name__ == "Conv1D"


def set_dropout(model: nn.Module, share: float) -> None:
    """Give every dropout of a model this share, that inside its attention too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, share)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Eval mode for a block, then every part in the mode it had.

    Part by part: a frozen part may rest in eval mode inside a model that trains.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def inputs_on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of model inputs on a device, without labels."""
    return {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"
    }
