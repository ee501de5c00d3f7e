"""Low-rank updates added to a frozen model at run time, without writing its weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors
from orthomerge.models.modules import is_transposed, layer_of


class Added(NamedTuple):
    """What one layer's output gains: `B (A x)`, the scaling in `B`."""

    A: Float[Tensor, "rank d_in"]
    B: Float[Tensor, "d_out rank"]


def added(
    layers: Mapping[str, LoraFactors], device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Added]:
    """An adapter's layers as they are added, on a device."""
    found: dict[str, Added] = {}
    for name in layers:
        factors = layers[name].to(device, dtype)
        found[name] = Added(factors.A, factors.B * factors.scaling)
    return found


def layers_of(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Module]:
    """The model's layers by the names that adapters give them.

    Raises:
        AdapterError: a layer that the model lacks, of another shape, or neither linear nor an
            embedding.
    """
    return {name: _checked(model, name, shape) for name, shape in shapes.items()}


class Adder:
    """Adds one update at a time to the layers of a model: `W x + B (A x)`, as PEFT does unmerged.

    The model's weights stay as they are, so a bfloat16 base does not round small updates away, and
    gradients reach the factors.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._current: Mapping[str, Added] = {}
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def using(self, update: Mapping[str, Added]) -> Generator[None, None, None]:
        """The model with this update, for the length of a block."""
        before = self._current
        self._current = update
        try:
            yield
        finally:
            self._current = before

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            update = self._current.get(name)
            if update is None:
                return output
            if isinstance(module, nn.Embedding):
                more = F.embedding(given[0], update.A.T) @ update.B.T
                scale = getattr(module, "embed_scale", None)  # Gemma's
                more = more if scale is None else more * torch.as_tensor(scale).to(more)
            else:
                more = (given[0].to(update.A.dtype) @ update.A.T) @ update.B.T
            return output + more.to(output.dtype)

        return add


def _checked(model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Module:
    layer = layer_of(model, name)
    weight = getattr(layer, "weight", None)
    linear = isinstance(layer, nn.Linear | nn.Embedding) or is_transposed(layer)
    if not linear or not isinstance(weight, Tensor):
        raise AdapterError(
            f"layer '{name}' is a {type(layer).__name__}: only adapters of linear and embedding "
            "layers can be distilled."
        )
    transposed = is_transposed(layer) or isinstance(layer, nn.Embedding)
    there = tuple(weight.T.shape if transposed else weight.shape)
    if there != shape:
        raise AdapterError(
            f"layer '{name}' is {list(there)}, the update {list(shape)}: the adapter was made for "
            "another model."
        )
    return layer
