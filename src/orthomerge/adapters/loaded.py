"""Adapters of a model in memory: read from it, and merged into a new one beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft import (
    set_peft_model_state_dict as put,  # pyright: ignore[reportUnknownVariableType]
)
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from orthomerge.adapters.base import dora_update
from orthomerge.adapters.experts import expert_layers, split, tensor_of
from orthomerge.adapters.files import Adapter
from orthomerge.adapters.heads import check_heads, head_of
from orthomerge.adapters.kinds import check_kind
from orthomerge.adapters.output import MergeOutput
from orthomerge.adapters.statistics import read_needed
from orthomerge.adapters.weights import weighed
from orthomerge.adapters.write import Frame, WrittenLayers, as_factors, lora_settings, whole_keys
from orthomerge.errors import AdapterError, unknown_name
from orthomerge.factors import LoraFactors
from orthomerge.merging import MergeConfig, MergedUpdate, get_method, merge_layers
from orthomerge.models.modules import is_transposed
from orthomerge.statistics import Statistics


def merge_loaded_adapters(
    peft_model: PeftModel,
    adapters: Sequence[str],
    name: str,
    config: MergeConfig | None = None,
    *,
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    **asked: Any,
) -> MergedUpdate:
    """Use in place of PEFT's `add_weighted_adapter`: merge a loaded model's adapters by any method.

    `merge_loaded_adapters(model, ["a", "b"], "merged", method="ties", density=0.2)`, then
    `model.set_adapter("merged")`. The new adapter takes its place beside the others, which stay as
    they are; it is not active, and not trained. The result is that of `merge_adapters` on the same
    adapters saved to folders, and so are weights, ranks and what may be `asked`.

    Args:
        peft_model: the model, with LoRA adapters.
        adapters: the names of the adapters to merge, in the order of the weights.
        name: the name of the new adapter.
        config: what is asked of the merge; `asked` are its fields and the method's options, in
            place of it or to change it. `heads="average"` gives the new adapter the mean of their
            heads and other `modules_to_save`; "keep" gives it the one head that there is.
        statistics: each adapter's statistics or file of them, for methods that need moments.
        fisher: each adapter's Fisher information or file of it, for methods that need it.

    Returns:
        The merged update, as of `merge_adapters`.

    Raises:
        AdapterError: no such adapter, a name that is taken, a kind that is no plain update, heads
            that differ and are to be kept, or a method that leaves one update per task.
        MergeError: weights, options, statistics or Fisher information that do not fit.
    """
    config = MergeConfig.of(config, **asked).for_adapter()
    if get_method(config.method).per_task:
        raise AdapterError(
            f"the method '{config.method}' leaves one update per task, and a new adapter has room "
            "for one: choose another method, or write folders with merge_adapters."
        )
    _require_free_name(peft_model, name)
    if not adapters:
        raise AdapterError("nothing to merge: name at least one adapter of the model.")
    read = [read_loaded(peft_model, adapter) for adapter in adapters]
    check_heads(read, config.heads)
    config, _reason = weighed(config, read)
    frame = MergeOutput(read, config).frame(room_for_head=True)
    _require_one_head(frame, read)
    needed = read_needed(config, read, statistics, fisher)
    merged = merge_layers([a.layers for a in read], config, **needed._asdict())
    _add(peft_model, name, merged, frame)
    return merged


def read_loaded(peft_model: PeftModel, adapter: str) -> Adapter:
    """An adapter of a model in memory, as `read_adapter` gives one of a folder; nothing is copied.

    Raises:
        AdapterError: no such adapter, or a kind that is no plain update.
    """
    if adapter not in peft_model.peft_config:
        raise unknown_name(
            "adapter", adapter, peft_model.peft_config, where="the model", error=AdapterError
        )
    said = cast(dict[str, Any], peft_model.peft_config[adapter].to_dict())
    config = {
        key: sorted(cast(set[str], value)) if isinstance(value, set) else value
        for key, value in said.items()
    }
    check_kind(config, adapter)
    layers: dict[str, LoraFactors] = {}
    biases: dict[str, Tensor] = {}
    modules: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    kernels: dict[str, tuple[int, ...]] = {}
    parameters: dict[str, int] = {}
    named = cast(Iterable[tuple[str, Any]], peft_model.get_base_model().named_modules())
    for layer, module in named:
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            own = module.modules_to_save[adapter].state_dict()
            modules |= {f"{layer}.{key}": tensor for key, tensor in own.items()}
        elif isinstance(module, LoraLayer) and adapter in module.lora_embedding_A:
            embeddings.add(layer)
            A = cast(Tensor, module.lora_embedding_A[adapter])
            B = cast(Tensor, module.lora_embedding_B[adapter])
            layers[layer] = _factors(module, adapter, layer, A, B)
        elif isinstance(module, ParamWrapper) and adapter in module.lora_A:
            wrapper = cast(Any, module)
            tensor, count = tensor_of(layer, module.parameter_name), int(wrapper.num_experts)
            A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
            experts = split(A.detach(), B.detach(), float(wrapper.scaling[adapter]), count)
            layers |= dict(zip(expert_layers(tensor, count), experts, strict=True))
            parameters[tensor] = count
        elif isinstance(module, LoraLayer) and adapter in module.lora_A:
            down, up = cast(Any, module.lora_A[adapter]), cast(Any, module.lora_B[adapter])
            A, B = down.weight.flatten(1), up.weight.flatten(1)
            layers[layer] = _factors(module, adapter, layer, A, B)
            if down.weight.ndim > 2:
                kernels[layer] = tuple(down.weight.shape[2:])
            if up.bias is not None:
                biases[layer] = up.bias.detach() * module.scaling[adapter]
    if not layers:
        raise AdapterError(f"the adapter '{adapter}' of the model has no LoRA layer.")
    return Adapter(
        adapter, layers, modules, config, biases=biases, embeddings=frozenset(embeddings),
        kernels=kernels, parameters=parameters,
    )  # fmt: skip


def _factors(module: Any, adapter: str, layer: str, A: Tensor, B: Tensor) -> LoraFactors:
    """The update of one layer; DoRA's is worked out from the layer's own weight."""
    base: nn.Module = module.get_base_layer()
    conv = isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d) and base.groups == 1
    plain = conv or isinstance(base, nn.Linear | nn.Embedding) or is_transposed(base)
    if A.ndim != 2 or B.ndim != 2 or not plain:
        raise AdapterError(
            f"layer '{layer}' of the adapter '{adapter}' is a {type(base).__name__}: only linear, "
            "convolutional (without groups) and embedding layers can be merged."
        )
    factors = LoraFactors(A.detach(), B.detach().to(A.dtype), float(module.scaling[adapter]))
    if not module.use_dora.get(adapter, False):
        return factors
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or module.merged:
        raise AdapterError(
            f"layer '{layer}' of the adapter '{adapter}' is DoRA on a weight that is quantized or "
            "has adapters merged into it: load the base in 16 or 32 bits, and unmerge it."
        )
    transposed = isinstance(base, nn.Embedding) or is_transposed(base)
    weight = weight.flatten(1)
    magnitude = module.lora_magnitude_vector[adapter].weight.detach()
    return dora_update(factors, magnitude, weight.detach().T if transposed else weight.detach())


def _require_one_head(frame: Frame, read: Sequence[Adapter]) -> None:
    owners = {a.name: head for a in read if (head := head_of(a))}
    missing = next((n for head in owners.values() for n in head if n not in frame.modules), None)
    if missing is not None:
        listed = ", ".join(f"'{name}'" for name in owners)
        raise AdapterError(
            f"the adapters {listed} have heads of their own ('{missing}'), and a new adapter has "
            "room for one: take their mean with heads='average', or write folders with "
            "merge_adapters, which keep each."
        )


def _require_free_name(peft_model: PeftModel, name: str) -> None:
    if not name or "." in name:
        raise AdapterError(f"'{name}' is no name for an adapter: PEFT takes one without a dot.")
    if name in peft_model.peft_config:
        raise AdapterError(
            f"the model has an adapter '{name}' already: choose another name, or delete it first "
            "with model.delete_adapter."
        )


def _add(peft_model: PeftModel, name: str, merged: MergedUpdate, frame: Frame) -> None:
    """Put the merged layers into the model, and leave all else in it as it was."""
    written = WrittenLayers(frame)
    tensors = {
        key: tensor
        for layer, update in merged.layers.items()
        for key, tensor in written.add(layer, as_factors(update)).items()
    }
    tensors |= {key: whole[n] for key, (whole, n) in whole_keys(merged.layers, frame).items()}
    config = LoraConfig(**lora_settings(written.ranks, frame))
    active = cast(str, peft_model.active_adapter)
    trained = {key: p.requires_grad for key, p in peft_model.named_parameters()}
    try:
        peft_model.add_adapter(name, config)
        loaded = cast(Any, put(peft_model, tensors, adapter_name=name))
        missing = [key for key in cast(list[str], loaded.missing_keys) if f".{name}." in f"{key}."]
        left: list[str] = [*missing, *loaded.unexpected_keys]
        if left:
            raise AdapterError(
                f"the model has no place for the merged adapter ({left[0]}): "
                "save the adapters, and merge the folders with merge_adapters."
            )
    except Exception:
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
        raise
    finally:
        if peft_model.active_adapter != active:
            peft_model.set_adapter(active)
        for key, parameter in peft_model.named_parameters():
            parameter.requires_grad_(trained.get(key, False))
