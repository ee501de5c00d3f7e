"""Adapters in, one adapter out: files around the merging methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from orthomerge.adapters.files import Adapter, read_adapter, require_same_base
from orthomerge.adapters.heads import check_heads
from orthomerge.adapters.output import TASKS, MergeOutput
from orthomerge.adapters.statistics import matched_fisher, matched_statistics
from orthomerge.adapters.write import require_free
from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors
from orthomerge.features import Statistics
from orthomerge.merging import MergedUpdate, get_method, iter_merge, merge_layers
from orthomerge.merging.merge import LayerWeights, MergedLayer


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
        method: a name of `orthomerge methods`.
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
    if not adapters:
        raise AdapterError("nothing to merge: name at least one adapter folder.")
    needs = get_method(method)
    if output is not None:
        require_free(output, overwrite=overwrite)
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=base) for a in adapters]
    require_same_base(read, base=base)
    check_heads(read, heads)
    plan = MergeOutput(
        read, method, weights, layer_weights or {}, rank, seed, dict(options), base, heads
    )
    layers = [a.layers for a in read]
    how: dict[str, Any] = {
        "method": method, "weights": weights, "layer_weights": layer_weights, "seed": seed,
        "rank": rank, "statistics": matched_statistics(needs, statistics, read, base),
        "fisher": matched_fisher(needs, fisher, read), "workers": workers, "devices": devices,
        "progress": progress, **options,
    }  # fmt: skip
    if output is None:
        return merge_layers(layers, **how)
    errors, tasks = plan.write(output, iter_merge(layers, **how))
    return _read_back(Path(output), method, errors, tasks)


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

    def layers(folder: Path) -> dict[str, LoraFactors | Tensor]:
        # A mapping that reads when asked serves as the dictionary that an in-memory merge has.
        return cast("dict[str, LoraFactors | Tensor]", read_adapter(folder).layers)

    own = tuple(layers(output / TASKS / task) for task in tasks)
    return MergedUpdate(layers(output), method, errors, own)
