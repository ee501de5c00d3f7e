"""Adapters in, one adapter out: files around the merging methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from orthomerge.adapters.base import find_base
from orthomerge.adapters.files import Adapter, LazyLayers, read_adapter, require_same_base
from orthomerge.adapters.full_model import save_full_model
from orthomerge.adapters.heads import check_heads, label_count
from orthomerge.adapters.output import TASKS, MergeOutput
from orthomerge.adapters.provenance import sources_of
from orthomerge.adapters.statistics import matched_fisher, matched_statistics
from orthomerge.adapters.write import require_free
from orthomerge.errors import AdapterError, MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import (
    MergedUpdate,
    Update,
    get_method,
    iter_merge,
    merge_layers,
    plan_merge,
)
from orthomerge.merging.merged import MergedLayer
from orthomerge.merging.plan import LayerWeights
from orthomerge.statistics import Statistics


def merge_adapters(
    adapters: Sequence[str | Path | Adapter],
    *,
    method: str = "linear",
    weights: Sequence[float] | float | None = None,
    layer_weights: LayerWeights | None = None,
    rank: int | None = None,
    seed: int = 0,
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    base: str | None = None,
    heads: str = "keep",
    output: str | Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
    devices: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> MergedUpdate:
    """Merge LoRA adapters of one base model, straight from their factors, a layer at a time.

    A layer that an adapter lacks counts as zero. Biases of `lora_bias` are summed with the weights
    whatever the method is, since methods are about `ΔW`; they are written, not returned.

    Args:
        adapters: PEFT folders, ids of the hub (`org/name`, `org/name@revision`) or adapters read
            before, in the order of `weights`.
        method: a name of `orthomerge list methods`.
        weights: one an adapter, one for all, or None for 1.0 each.
        layer_weights: other weights for layers that a regular expression finds; the first decides.
        rank: truncate every layer to this rank (best approximation); None keeps what the method
            gives.
        seed: for methods that draw.
        statistics: each adapter's statistics or file of them, for methods that need moments.
        fisher: each adapter's Fisher information or file of it, for methods that need it.
        base: the base model's folder or id, for DoRA and where adapters call it by several names.
        heads: what becomes of task heads and other `modules_to_save`: "keep" them a task under
            `heads/`, "average" them into the adapter (the plain mean), or "refuse".
        output: write the merged adapter to this folder, and each task's own under `tasks/` where
            the method leaves such. The folder appears whole or not at all, and what is returned
            reads it a layer at a time.
        overwrite: replace an output folder that is not empty.
        workers: layers merged side by side.
        devices: devices that take layers side by side.
        progress: called with the number of layers done and their total.
        options: of the method, as `density=0.2`.

    Raises:
        AdapterError: fewer than one adapter, different base models or shapes, unreadable folders,
            heads that cannot be treated so, or an output that is not free.
        MergeError: weights, shapes, options or statistics that do not fit.
        UnknownNameError: no such method.
    """
    if output is not None:
        require_free(output, overwrite=overwrite)
    plan, layers, how = _prepare(
        adapters, method, weights, layer_weights, rank, seed, statistics, fisher, base, heads,
        options,
    )  # fmt: skip
    how |= {"workers": workers, "devices": devices, "progress": progress}
    if output is None:
        return merge_layers(layers, **how)
    errors, tasks = plan.write(output, iter_merge(layers, **how))
    return _read_back(Path(output), method, errors, tasks)


def merge_to_model(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    method: str = "linear",
    weights: Sequence[float] | float | None = None,
    layer_weights: LayerWeights | None = None,
    rank: int | None = None,
    seed: int = 0,
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    base: str | None = None,
    heads: str = "keep",
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Merge adapters into their base model and write it whole, as ordinary sharded safetensors.

    The base is read and the model written a block at a time (see `save_full_model`); layers are
    merged in the order of the base's shards. Arguments and errors as of `merge_adapters`; a folder
    has room for one head, so `heads="keep"` writes every task's under `heads/` beside the model.
    Returns the truncation error of every layer that was cut.

    Raises:
        AdapterError: besides, a base that is not to be found, is pickled or lacks a layer.
        MergeError: besides, a method that leaves an update a task.
    """
    if get_method(method).per_task:
        raise MergeError(
            f"the method '{method}' leaves an update a task, so there is no one model to write: "
            "write adapters, or choose another method."
        )
    plan, layers, how = _prepare(
        adapters, method, weights, layer_weights, rank, seed, statistics, fisher, base, heads,
        options, max_shard_size,
    )  # fmt: skip
    frame = plan.frame()
    found = find_base(base or frame.base_model)
    plan = replace(plan, base_sha256=found.sha256)
    merge = plan_merge(layers, **how)
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
        overwrite=overwrite,
        modules=dict(frame.modules),
        config=_labels(frame.modules, frame.task_type),
        biases=frame.biases,
        progress=progress,
        finish=lambda folder: plan.describe(folder, errors, tasks=False, model=True),
    )
    return errors


def _labels(modules: Mapping[str, Tensor], task_type: str | None) -> dict[str, Any]:
    """What `config.json` must say for a head of other labels than the base has."""
    labels = label_count({name: tuple(m.shape) for name, m in modules.items()}, task_type)
    if not labels:
        return {}
    names = [f"LABEL_{i}" for i in range(labels)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _prepare(
    adapters: Sequence[str | Path | Adapter],
    method: str,
    weights: Sequence[float] | float | None,
    layer_weights: LayerWeights | None,
    rank: int | None,
    seed: int,
    statistics: Sequence[str | Path | Statistics] | None,
    fisher: Sequence[str | Path | Mapping[str, Tensor]] | None,
    base: str | None,
    heads: str,
    options: Mapping[str, Any],
    max_shard_size: int | str | None = None,
) -> tuple[MergeOutput, list[Mapping[str, LoraFactors]], dict[str, Any]]:
    """What is written beside the layers, the adapters' layers, and how they are merged."""
    if not adapters:
        raise AdapterError("nothing to merge: name at least one adapter folder.")
    needs = get_method(method)
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=base) for a in adapters]
    require_same_base(read, base=base)
    check_heads(read, heads)
    how: dict[str, Any] = {
        "method": method, "weights": weights, "layer_weights": layer_weights, "seed": seed,
        "rank": rank, "statistics": (matched := matched_statistics(needs, statistics, read, base)),
        "fisher": matched_fisher(needs, fisher, read), **options,
    }  # fmt: skip
    plan = MergeOutput(
        read, method, weights, layer_weights or {}, rank, seed, dict(options), base, heads,
        statistics=sources_of(statistics), fisher=sources_of(fisher),
        max_shard_size=max_shard_size, base_sha256=_base_sha256(read, matched or ()),
    )  # fmt: skip
    return plan, [a.layers for a in read], how


def _base_sha256(adapters: Sequence[Adapter], statistics: Sequence[Statistics]) -> str | None:
    """The base's hash, where its weights were read (for DoRA) or the statistics tell it."""
    read = [a.layers.base_sha256 for a in adapters if isinstance(a.layers, LazyLayers)]
    return next((h for h in (*read, *(s.meta.model_sha256 for s in statistics)) if h), None)


def save_merged(
    output: str | Path,
    merged: MergedUpdate,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
    heads: str = "keep",
    overwrite: bool = False,
) -> Path:
    """Write a merge that is in memory as `merge_adapters` writes one; `names` are the tasks'.

    Raises:
        AdapterError: heads that cannot be treated so, or an output that is not free.
    """
    require_free(output, overwrite=overwrite)
    check_heads(adapters, heads)
    plan = MergeOutput(
        adapters, merged.method, weights, {}, rank, seed, options or {}, None, heads, names
    )
    plan.write(output, _layers_of(merged))
    return Path(output)


def _layers_of(merged: MergedUpdate) -> Iterator[MergedLayer]:
    for name, update in merged.layers.items():
        own = tuple(task[name] for task in merged.tasks)
        yield MergedLayer(name, update, own, merged.truncation_error.get(name))


def _read_back(
    output: Path, method: str, errors: dict[str, float], tasks: Sequence[str]
) -> MergedUpdate:
    """The written merge, its layers read when they are asked for."""
    own = tuple(read_adapter(output / TASKS / task).layers for task in tasks)
    return MergedUpdate(read_adapter(output).layers, method, errors, own)
