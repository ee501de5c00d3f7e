"""Adapters in, one adapter out: files around the merging methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from orthomerge.adapters.card import merge_record, model_card, notes_on
from orthomerge.adapters.files import Adapter, read_adapter, require_same_base
from orthomerge.adapters.heads import AveragedModules, check_heads, saved_modules
from orthomerge.adapters.statistics import matched_statistics
from orthomerge.adapters.write import AdapterWriter, Frame, require_free, write_heads
from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors
from orthomerge.features import Statistics
from orthomerge.files import atomic_path, slug, write_json
from orthomerge.merging import MergedUpdate, get_method, iter_merge, merge_layers
from orthomerge.merging.merge import LayerWeights, MergedLayer

TASKS = "tasks"
# With these PEFT adds the head to what it loads, which the shared adapter has only if averaged.
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def merge_adapters(
    adapters: Sequence[str | Path | Adapter],
    *,
    method: str = "linear",
    weights: Sequence[float] | float | None = None,
    layer_weights: LayerWeights | None = None,
    rank: int | None = None,
    seed: int = 0,
    statistics: Sequence[str | Path | Statistics] | None = None,
    fisher: Sequence[Mapping[str, Tensor]] | None = None,
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
        fisher: each adapter's diagonal Fisher information, for methods that need it.
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
    plan = _Plan(read, method, weights, layer_weights or {}, rank, seed, dict(options), base, heads)
    layers = [a.layers for a in read]
    how: dict[str, Any] = {
        "method": method, "weights": weights, "layer_weights": layer_weights, "seed": seed,
        "rank": rank, "statistics": matched_statistics(needs, statistics, read, base),
        "fisher": fisher, "workers": workers, "devices": devices, "progress": progress, **options,
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
    plan = _Plan(
        adapters, merged.method, weights, {}, rank, seed, options or {}, None, heads, names
    )
    plan.write(output, _layers_of(merged))
    return Path(output)


def _layers_of(merged: MergedUpdate) -> Iterator[MergedLayer]:
    for name, update in merged.layers.items():
        own = tuple(task[name] for task in merged.tasks)
        yield MergedLayer(name, update, own, merged.truncation_error.get(name))


@dataclass(frozen=True)
class _Plan:
    """All of a merge but its layers."""

    adapters: Sequence[Adapter]
    method: str
    weights: Sequence[float] | float | None
    layer_weights: LayerWeights
    rank: int | None
    seed: int
    options: dict[str, Any]
    base: str | None
    heads: str
    names: Sequence[str] | None = None

    def write(
        self, output: str | Path, layers: Iterable[MergedLayer]
    ) -> tuple[dict[str, float], list[str]]:
        """Write the merged adapter and each task's own; the truncation errors, the tasks' folders.

        Layers are written as they come. Nothing is seen at `output` before all of it is there.
        """
        tasks = [slug(name) for name in self._names()]
        shared, own = self._frame(), [self._task_frame(i) for i in range(len(tasks))]
        errors: dict[str, float] = {}
        written: list[str] = []
        with atomic_path(output) as folder:
            with ExitStack() as open_files:
                writer = open_files.enter_context(AdapterWriter(folder, self._layers(), shared))
                writers: list[AdapterWriter] = []
                for layer in layers:
                    if layer.tasks and not writers:
                        written = tasks
                        writers = [
                            open_files.enter_context(
                                AdapterWriter(folder / TASKS / task, self._layers(), frame)
                            )
                            for task, frame in zip(tasks, own, strict=True)
                        ]
                    writer.add(layer.name, layer.update, self.rank)
                    for one, update in zip(writers, layer.tasks, strict=True):
                        one.add(layer.name, update, self.rank)
                    if layer.truncation_error is not None:
                        errors[layer.name] = layer.truncation_error
            self._describe(folder, shared, errors, tasks=bool(written))
        return errors, written

    def _describe(
        self, folder: Path, frame: Frame, errors: Mapping[str, float], *, tasks: bool
    ) -> None:
        """The record, the heads and the model card."""
        record = merge_record(
            self.method, self.adapters, self._names(), self._spread(),
            base_model=frame.base_model, layer_weights=self.layer_weights, options=self.options,
            seed=self.seed, rank=self.rank, heads=self.heads,
        )  # fmt: skip
        write_json(folder / "merge.json", {**record, "truncation_error": dict(errors)})
        modules = {
            n: a.modules for n, a in zip(self._names(), self.adapters, strict=True) if a.modules
        }
        if self.heads == "keep":
            write_heads(folder, modules)
        card = model_card(
            record,
            self.adapters[0].config.get("task_type"),
            notes_on(self.heads, modules=bool(modules), tasks=tasks),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _names(self) -> list[str]:
        if self.names is not None:
            return list(self.names)
        names: list[str] = []
        for adapter in self.adapters:
            name, number = adapter.name, 2
            while slug(name) in map(slug, names):
                name, number = f"{adapter.name}-{number}", number + 1
            names.append(name)
        return names

    def _spread(self) -> list[float]:
        weights = 1.0 if self.weights is None else self.weights
        if isinstance(weights, int | float):
            return [float(weights)] * len(self.adapters)
        return [float(w) for w in weights]

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(name for a in self.adapters for name in a.layers))

    def _frame(self) -> Frame:
        """The shared adapter's, with the mean head where that is asked for."""
        modules = AveragedModules(self.adapters) if self.heads == "average" else {}
        kinds = {a.config.get("task_type") for a in self.adapters}
        kind = kinds.pop() if len(kinds) == 1 else None
        frame = Frame(
            base_model=self.base or self.adapters[0].base_model,
            targets=_targets(self.adapters, self._layers()),
            embeddings=frozenset().union(*(a.embeddings for a in self.adapters)),
            biases=self._biases(range(len(self.adapters))),
            modules=modules,
            modules_to_save=saved_modules(self.adapters, modules),
            task_type=kind if modules or kind not in _WITH_HEAD else None,
            transposed=any(a.config.get("fan_in_fan_out") for a in self.adapters),
        )
        if frame.biases and frame.embeddings:
            raise AdapterError(
                "some adapters have lora_bias and some adapt embeddings, which PEFT cannot have in "
                "one adapter: merge them apart."
            )
        return frame

    def _task_frame(self, task: int) -> Frame:
        """One task's own, with its own head."""
        adapter = self.adapters[task]
        return replace(
            self._frame(),
            biases=self._biases([task]),
            modules=adapter.modules,
            modules_to_save=saved_modules([adapter], adapter.modules),
            task_type=adapter.config.get("task_type") if adapter.modules else None,
        )

    def _biases(self, tasks: Iterable[int]) -> dict[str, Tensor]:
        """The weighted sum of these tasks' biases, `[d_out]` a layer; empty where no task has any.

        A bias is an update of a layer with one constant input, so the engine sums it, with every
        layer's own weights.
        """
        if not any(a.biases for a in self.adapters):
            return {}
        chosen = set(tasks)
        shapes = {name: shape for a in self.adapters for name, shape in a.shapes.items()}
        none = {n: torch.zeros(d_out) for n, (d_out, _) in shapes.items()}
        columns = [
            {n: _column((a.biases if i in chosen else none).get(n, none[n])) for n in shapes}
            for i, a in enumerate(self.adapters)
        ]
        summed = merge_layers(columns, weights=self.weights, layer_weights=self.layer_weights)
        return {name: summed.dense(name)[:, 0] for name in shapes}


def _column(bias: Tensor) -> LoraFactors:
    return LoraFactors(bias.new_ones(1, 1), bias[:, None])


def _targets(adapters: Sequence[Adapter], layers: Sequence[str]) -> list[str] | None:
    """The union of the adapters' target modules where it means their layers and no others.

    It does where each is a plain list: PEFT adapts every module a list names, so an adapter has all
    of them. Else None, for the layers' full names.
    """
    found: set[str] = set()
    for adapter in adapters:
        named = adapter.config.get("target_modules")
        narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
        if not isinstance(named, list) or any(adapter.config.get(key) for key in narrowed):
            return None
        found |= set(named)
    ends = tuple(f".{name}" for name in found)
    return sorted(found) if all(f".{layer}".endswith(ends) for layer in layers) else None


def _read_back(
    output: Path, method: str, errors: dict[str, float], tasks: Sequence[str]
) -> MergedUpdate:
    """The written merge, its layers read when they are asked for."""

    def layers(folder: Path) -> dict[str, LoraFactors | Tensor]:
        # A mapping that reads when asked serves as the dictionary that an in-memory merge has.
        return cast("dict[str, LoraFactors | Tensor]", read_adapter(folder).layers)

    own = tuple(layers(output / TASKS / task) for task in tasks)
    return MergedUpdate(layers(output), method, errors, own)
