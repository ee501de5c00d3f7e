"""Adapters in, one adapter out: files around the merging methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from orthomerge.adapters.align import align_adapters
from orthomerge.adapters.architecture import read_config, vocabulary_size
from orthomerge.adapters.base import find_base
from orthomerge.adapters.files import Adapter, LazyLayers, read_adapter
from orthomerge.adapters.full_model import save_full_model
from orthomerge.adapters.heads import check_heads, label_count
from orthomerge.adapters.output import MergeOutput, is_file_output, require_free_for_file
from orthomerge.adapters.statistics import read_needed
from orthomerge.adapters.tokenizers import tokenizer_of, warn_of_tokens_without_row
from orthomerge.adapters.weights import weighed
from orthomerge.errors import AdapterError, MergeError
from orthomerge.factors import LoraFactors
from orthomerge.io.names import TASKS
from orthomerge.io.outputs import require_apart, require_free
from orthomerge.io.tensors import shapes_of
from orthomerge.merging import (
    LayerWeights,
    MergeConfig,
    MergedUpdate,
    Update,
    Weights,
    get_method,
    iter_merge,
    merge_layers,
    plan_merge,
)
from orthomerge.merging.merged import MergedLayer
from orthomerge.records import sources_of
from orthomerge.statistics import Statistics


def merge_adapters(
    adapters: Sequence[str | Path | Adapter],
    config: MergeConfig | None = None,
    *,
    method: str | None = None,
    weights: Weights | None = None,
    layer_weights: LayerWeights | None = None,
    rank: int | str | None = None,
    energy: float | None = None,
    seed: int | None = None,
    heads: str | None = None,
    base: str | None = None,
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
    devices: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> MergedUpdate:
    """Merge LoRA adapters of one base model, straight from their factors, a layer at a time.

    `merge_adapters(["a/", "b/"], method="ties", weights=0.5, density=0.2, output="merged/")`.
    A layer that an adapter lacks counts as zero. Biases of `lora_bias` are summed with the weights
    whatever the method is, since methods are about `ΔW`; they are written, not returned.

    Args:
        adapters: PEFT folders, ids of the hub (`org/name`, `org/name@revision`) or adapters read
            before, in the order of `weights`.
        config: what is asked of the merge, where it was put together before. `method` (linear by
            default), `weights`, `layer_weights`, `rank`, `energy`, `seed`, `heads`, `base` and the
            method's options (`density=0.2`) say the same in place of it, or change it;
            `MergeConfig` says what each means. Without weights, adapters that were trained the
            usual way are summed at 1/√N, and at 1 where their records say that they were made to be
            summed; methods that average have weight 1 (`list_methods()` says which, `merge.json`
            why). Without a rank, a dense update is cut to the sum of the adapters' ranks in its
            layer, and what was lost is in `truncation_error`; `rank="full"` keeps all.
        statistics: each adapter's statistics or file of them, for methods that need moments.
        fisher: each adapter's Fisher information or file of it, for methods that need it.
        output: write the merged adapter to this folder, and each task's own under `tasks/` where
            the method leaves such. The folder appears whole or not at all, and what is returned
            reads it a layer at a time.
        overwrite: replace an output folder that orthomerge wrote.
        workers: number of layers merged in parallel.
        devices: devices that take layers in parallel.
        progress: called with the number of layers done and their total.

    Raises:
        AdapterError: fewer than one adapter, different base models or shapes, unreadable folders,
            or heads that cannot be treated so.
        OutputError: an output that is not free, or that overlaps with an input or the base.
        MergeError: weights, shapes, options or statistics that do not fit.
        UnknownNameError: no such method.
    """
    config = MergeConfig.of(
        config, method=method, weights=weights, layer_weights=layer_weights, rank=rank,
        energy=energy, seed=seed, heads=heads, base=base, **options,
    ).for_adapter()  # fmt: skip
    if output is not None:
        inputs = [*adapters, *(statistics or ()), *(fisher or ())]
        if is_file_output(output):
            require_free_for_file(output, inputs=inputs, overwrite=overwrite)
        else:
            require_free(output, inputs=inputs, base=config.base, overwrite=overwrite)
    plan, layers, given = prepare_merge(adapters, config, statistics, fisher)
    if output is not None:
        if is_file_output(output):
            _require_one_file(output, plan)
        _require_apart_from_bases(output, plan.adapters)
    run: dict[str, Any] = {"workers": workers, "devices": devices, "progress": progress}
    if output is None:
        return merge_layers(layers, plan.config, **given, **run)
    errors, tasks = plan.write(output, iter_merge(layers, plan.config, **given, **run))
    return _read_back(Path(output), plan.config, errors, tasks)


def merge_to_model(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    config: MergeConfig | None = None,
    *,
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    max_shard_size: int | str | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> dict[str, float]:
    """Merge adapters into their base model and write it whole, as ordinary sharded safetensors.

    The base is read and the model written a block at a time (see `save_full_model`); layers are
    merged in the order of the base's shards. Arguments and errors are those of `merge_adapters`,
    `asked` being the fields of a `MergeConfig` and the method's options. A model has room for one
    head: with `heads="keep"` it is the one that one adapter has, or on which all agree, and every
    task's is under `heads/` next to the model. A tokenizer beside the adapters goes with it.
    Nothing is cut where no rank is asked for. A quantized base gives a model in 16 bits or, with
    `requantize`, one quantized again as bitsandbytes quantized it; what that cost each layer is in
    `merge.json` (`quantization_error`). Returns the truncation error of every layer that was cut.

    Raises:
        AdapterError: besides, a base that is not to be found, is pickled or lacks a layer.
        MergeError: besides, a method that leaves one update per task.
    """
    config = MergeConfig.of(config, **asked)
    if get_method(config.method).per_task:
        raise MergeError(
            f"the method '{config.method}' leaves one update per task, so there is no one model to "
            "write: write adapters, or choose another method."
        )
    inputs = [*adapters, *(statistics or ()), *(fisher or ())]
    require_free(output, inputs=inputs, base=config.base, overwrite=overwrite)
    plan, layers, given = prepare_merge(adapters, config, statistics, fisher)
    if plan.adapters[0].form is not None:
        raise AdapterError(
            f"'{plan.adapters[0].called}' is an adapter of a diffusion model, which is not written "
            "whole here: write the merge as an adapter, and load it in diffusers "
            "(load_lora_weights, fuse_lora)."
        )
    _require_apart_from_bases(output, plan.adapters)
    frame = plan.frame(room_for_head=True)
    found = find_base(config.base or frame.base_model, None if config.base else frame.revision)
    lost: dict[str, float] | None = {} if requantize else None
    plan = replace(
        plan, base_sha256=found.sha256, max_shard_size=max_shard_size, quantization_error=lost
    )
    merge = plan_merge(layers, plan.config, **given)
    errors: dict[str, float] = {}

    def update_of(layer: str) -> Update:
        merged = merge.merge(layer)
        if merged.truncation_error is not None:
            errors[layer] = merged.truncation_error
        return merged.update

    save_full_model(
        output,
        Path(found.path_or_id),
        update_of,
        names=merge.names,
        max_shard_size=max_shard_size,
        requantize=None if lost is None else lost.__setitem__,
        overwrite=overwrite,
        modules=frame.modules,
        copies=frame.copies,
        config=_labels(frame.modules, frame.task_type),
        biases=frame.biases,
        parameters=frame.parameters,
        progress=progress,
        finish=lambda folder: plan.describe(folder, errors, tasks=False, model=True),
    )
    if plan.tokenizer is not None:
        warn_of_tokens_without_row(plan.tokenizer, vocabulary_size(read_config(Path(output))))
    return errors


def _require_one_file(output: str | Path, plan: MergeOutput) -> None:
    """Refuse a file as the output of what is a folder."""
    method = plan.config.method
    if get_method(method).per_task:
        raise MergeError(
            f"the method '{method}' leaves one update per task, and '{output}' is one file: name a "
            "folder."
        )
    if plan.adapters[0].form is None:
        raise AdapterError(
            f"'{output}' is the name of a file, and a PEFT adapter is a folder: name a folder."
        )


def _require_apart_from_bases(output: str | Path, adapters: Sequence[Adapter]) -> None:
    """Refuse an output that would take the place of a base model that an adapter names."""
    for base in {adapter.base_model for adapter in adapters}:
        require_apart(output, base=base)


def _labels(modules: Mapping[str, Tensor], task_type: str | None) -> dict[str, Any]:
    """What `config.json` must say for a head of other labels than the base has."""
    labels = label_count(shapes_of(modules), task_type)
    if not labels:
        return {}
    names = [f"LABEL_{i}" for i in range(labels)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def prepare_merge(
    adapters: Sequence[str | Path | Adapter],
    config: MergeConfig,
    statistics: Sequence[str | Path | Statistics] | None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None,
) -> tuple[MergeOutput, list[Mapping[str, LoraFactors]], dict[str, Any]]:
    """What is written in addition to the layers, the adapters' layers, what the method is given."""
    if not adapters:
        raise AdapterError("nothing to merge: name at least one adapter folder.")
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=config.base) for a in adapters]
    read = align_adapters(read, base=config.base)
    check_heads(read, config.heads)
    tokenizer = tokenizer_of(read)
    config, reason = weighed(config, read)
    needed = read_needed(config, read, statistics, fisher)
    plan = MergeOutput(
        read, config, statistics=sources_of(statistics), fisher=sources_of(fisher),
        weights_reason=reason, base_sha256=_base_sha256(read, needed.statistics or ()),
        tokenizer=tokenizer,
    )  # fmt: skip
    return plan, [a.layers for a in read], needed._asdict()


def _base_sha256(adapters: Sequence[Adapter], statistics: Sequence[Statistics]) -> str | None:
    """The base's hash, where its weights were read (for DoRA) or the statistics tell it."""
    read = [a.layers.base_sha256 for a in adapters if isinstance(a.layers, LazyLayers)]
    return next((h for h in (*read, *(s.meta.model_sha256 for s in statistics)) if h), None)


def save_merged(
    output: str | Path,
    merged: MergedUpdate,
    adapters: Sequence[Adapter],
    config: MergeConfig,
    *,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a merge that is in memory as `merge_adapters` writes one; `names` are the tasks'.

    Raises:
        AdapterError: heads that cannot be treated so.
        OutputError: an output that is not free, or that contains an adapter or is inside one.
    """
    require_free(output, inputs=adapters, overwrite=overwrite)
    check_heads(adapters, config.heads)
    plan = MergeOutput(adapters, config, names, tokenizer=tokenizer_of(adapters))
    plan.write(output, _layers_of(merged))
    return Path(output)


def _layers_of(merged: MergedUpdate) -> Iterator[MergedLayer]:
    for name, update in merged.layers.items():
        own = tuple(task[name] for task in merged.tasks)
        yield MergedLayer(name, update, own, merged.truncation_error.get(name))


def _read_back(
    output: Path, config: MergeConfig, errors: dict[str, float], tasks: Sequence[str]
) -> MergedUpdate:
    """The written merge, its layers read when they are asked for."""
    own = tuple(read_adapter(output / TASKS / task).layers for task in tasks)
    return MergedUpdate(read_adapter(output).layers, config.method, errors, own, config)
