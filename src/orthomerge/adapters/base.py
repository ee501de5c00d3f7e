"""The base model's weights, read a layer at a time from its safetensors; DoRA needs them."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge import linalg
from orthomerge.adapters.architecture import Names, architecture_of, read_config
from orthomerge.adapters.checkpoint import read_checkpoint
from orthomerge.adapters.quantized import packed_weights, plain_tensors
from orthomerge.errors import AdapterError, AssetError
from orthomerge.factors import LoraFactors
from orthomerge.io.tensors import Held, read_tensor
from orthomerge.models.assets import ResolvedModel, resolve_model


def find_base(model: str | None, revision: str | None = None) -> ResolvedModel:
    """A base model: a folder, of a package, or the hub's snapshot, at a revision if one is named.

    Raises:
        AdapterError: no model named, or none to be found.
    """
    if not model:
        raise AdapterError("the adapters do not name their base model: name it with base (--base).")
    try:
        return resolve_model(model, revision=revision)
    except AssetError as problem:
        raise AdapterError(str(problem)) from problem


class BaseWeights:
    """The weights of a base model's layers by the names adapters use.

    Adapters name a layer below the model with its head, base models are often saved without, and
    both may have the names of an older Transformers.

    Raises:
        AdapterError: no such model, or none in safetensors.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self._model, found = model, find_base(model, revision)
        self.sha256 = found.sha256
        folder = Path(found.path_or_id)
        tensors, settings = read_checkpoint(folder).tensors, read_config(folder)
        packed = packed_weights(tensors, settings, folder)
        self._weights = plain_tensors(tensors, packed, settings)
        self._names = Names(architecture_of(folder, settings), self._weights)

    def weight(
        self, layer: str, shape: tuple[int, int], *, transposed: bool
    ) -> Float[Tensor, "d_out d_in"]:
        """`W` of a layer; `transposed` says how it is kept where the shape does not (GPT-2).

        Raises:
            AdapterError: the model has no such layer, or one of another shape.
        """
        name = self._names.find(f"{layer}.weight")
        if name is None:
            raise AdapterError(
                f"the base model '{self._model}' has no weight for layer '{layer}': name the model "
                "that the adapter was trained on."
            )
        stored = self._weights[name]
        weight = stored.make() if isinstance(stored, Held) else read_tensor(stored)
        weight = weight.flatten(1) if weight.ndim > 2 else weight
        if tuple(weight.shape) not in (shape, shape[::-1]):
            raise AdapterError(
                f"layer '{layer}' is {list(weight.shape)} in the base model '{self._model}' and "
                f"{list(shape)} in the adapter: name the model that the adapter was trained on."
            )
        square = shape[0] == shape[1]
        return weight.T if (transposed if square else tuple(weight.shape) != shape) else weight


def dora_update(
    factors: LoraFactors,
    magnitude: Float[Tensor, " d_out"],
    weight: Float[Tensor, "d_out d_in"],
) -> LoraFactors:
    """DoRA's dense update `ΔW = m · (W + s B A) / ‖W + s B A‖ - W`, norms by row, as factors.

    It has no low rank: one factor is the update itself, the other the identity. In float64, then
    float32 or better (Liu et al. 2024, arXiv 2402.09353, equation 5).
    """
    W = weight.double()
    moved = W + factors.to(torch.float64).delta()
    scale = magnitude.double().reshape(-1, 1) / linalg.vector_norm(moved, dim=1, keepdim=True)
    dtype = torch.promote_types(factors.A.dtype, torch.float32)
    return dense_factors((scale * moved - W).to(dtype))


def dense_factors(delta: Float[Tensor, "d_out d_in"]) -> LoraFactors:
    """A dense update as factors, exactly: itself beside the identity on its smaller side."""
    d_out, d_in = delta.shape
    if d_out <= d_in:
        return LoraFactors(delta, torch.eye(d_out, dtype=delta.dtype, device=delta.device))
    return LoraFactors(torch.eye(d_in, dtype=delta.dtype, device=delta.device), delta)
