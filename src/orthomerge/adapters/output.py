"""A merge's folder: the shared adapter, each task's own, heads, record and model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.diffusion import common_header
from orthomerge.adapters.experts import place_of
from orthomerge.adapters.files import Adapter, common_base
from orthomerge.adapters.heads import (
    CLASSIFIERS,
    described_head,
    head_of,
    saved_modules,
    whole_tensors,
)
from orthomerge.adapters.tokenizers import put_tokenizer
from orthomerge.adapters.write import AdapterWriter, Frame, write_heads
from orthomerge.errors import AdapterError, OutputError
from orthomerge.factors import LoraFactors
from orthomerge.io.documents import is_array, read_json
from orthomerge.io.files import atomic_path, slug
from orthomerge.io.names import DIFFUSION, IN_HEADER, MERGE, TASKS
from orthomerge.io.outputs import require_apart, require_free_file
from orthomerge.io.tensors import Planned, open_tensors, read_metadata, write_tensors
from orthomerge.merging import MergeConfig, merge_layers
from orthomerge.merging.merged import MergedLayer
from orthomerge.records import cards, merge_record, seal

_SEAL = ("files", "sha256")


@dataclass(frozen=True)
class MergeOutput:
    """All of a merge but its layers, and the folder it is written to.

    For what is written in another form (a full model), `frame` says what belongs beside the layers
    and `record` what went in. `names` are the tasks', by default the adapters' own; `statistics`
    and `fisher` say which files the method was given, `base_sha256` which base they, or the full
    model, are of; `weights_reason` why the weights are what they are, where the user gave none;
    `tokenizer` the folder whose tokenizer goes with the merge; `quantization_error` what each layer
    lost where a full model is quantized again.
    """

    adapters: Sequence[Adapter]
    config: MergeConfig
    names: Sequence[str] | None = None
    statistics: Sequence[Mapping[str, Any]] = ()
    fisher: Sequence[Mapping[str, Any]] = ()
    max_shard_size: int | str | None = None
    base_sha256: str | None = None
    weights_reason: str = ""
    quantization_error: Mapping[str, float] | None = None
    tokenizer: Path | None = None

    def write(
        self, output: str | Path, layers: Iterable[MergedLayer]
    ) -> tuple[dict[str, float], list[str]]:
        """Write the merged adapter and each task's own; the truncation errors, the tasks' folders.

        Layers are written as they come. Nothing is seen at `output` before all of it is there. An
        adapter of a diffusion model may be one file, with the record in its header.
        """
        tasks = [slug(name) for name in self._names()]
        shared, own = self.frame(), [self.task_frame(i) for i in range(len(tasks))]
        errors: dict[str, float] = {}
        written: list[str] = []
        with atomic_path(output) as place:
            folder = place.with_suffix("") if is_file_output(output) else place
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
                    writer.add(layer.name, layer.update)
                    for one, update in zip(writers, layer.tasks, strict=True):
                        one.add(layer.name, update)
                    if layer.truncation_error is not None:
                        errors[layer.name] = layer.truncation_error
            self.describe(folder, errors, tasks=bool(written))
            if folder != place:
                # Its hashes are of the folder's files.
                record = read_json(folder / MERGE)
                write_with_record(folder, place, {k: record[k] for k in record if k not in _SEAL})
        return errors, written

    def describe(
        self, folder: Path, errors: Mapping[str, float], *, tasks: bool, model: bool = False
    ) -> None:
        """Write record, heads, tokenizer and cards of an adapter, or of a whole model."""
        if self.config.heads == "keep":
            heads = zip(self._names(), map(head_of, self.adapters), strict=True)
            write_heads(folder, {name: head for name, head in heads if head})
        if self.tokenizer is not None:
            put_tokenizer(self.tokenizer, folder)
        lost = self.quantization_error
        record = {
            **self.record(),
            "form": "model" if model else "adapter",
            "max_shard_size": self.max_shard_size,
            **({} if lost is None else {"quantization_error": dict(lost)}),
            "truncation_error": dict(errors),
            "own_adapters": [slug(name) for name in self._names()] if tasks else [],
        }
        for name, card in cards(record).items():
            (folder / name).write_text(card, encoding="utf-8")
        seal(folder, MERGE, record)

    def record(self) -> dict[str, Any]:
        """What went in, as `merge.json` holds it; the truncation errors come with the layers."""
        names = self._names()
        heads = [described_head(n, a) for n, a in zip(names, self.adapters, strict=True)]
        record = merge_record(
            self.config, self.adapters, names, heads,
            base_model=common_base(self.adapters)[0], base_sha256=self.base_sha256,
            statistics=self.statistics, fisher=self.fisher,
        )  # fmt: skip
        return record | ({"weights_reason": self.weights_reason} if self.weights_reason else {})

    def _names(self) -> list[str]:
        if self.names is not None:
            return list(self.names)
        return distinct_names(self.adapters)

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(name for a in self.adapters for name in a.layers))

    def frame(self, *, room_for_head: bool = False) -> Frame:
        """The shared adapter's, with the mean head where that is asked for.

        With `room_for_head` it has the one head of all adapters, too, where there is such.
        """
        whole = whole_tensors(self.adapters, self.config.heads, room_for_head=room_for_head)
        kinds = {a.config.get("task_type") for a in self.adapters}
        kind = kinds.pop() if len(kinds) == 1 else None
        named, revision = common_base(self.adapters)
        parameters = {name: n for a in self.adapters for name, n in a.parameters.items()}
        layers = [n for n in self._layers() if place_of(n, parameters)[0] not in parameters]
        frame = Frame(
            base_model=self.config.base or named,
            revision=revision if self.config.base in (None, named) else None,
            targets=_targets(self.adapters, "target_modules", layers),
            target_parameters=_targets(self.adapters, "target_parameters", list(parameters)),
            parameters=parameters,
            embeddings=frozenset[str]().union(*(a.embeddings for a in self.adapters)),
            kernels={n: k for a in self.adapters for n, k in a.kernels.items()},
            biases=self._biases(range(len(self.adapters))),
            modules=whole.modules,
            copies=whole.copies,
            modules_to_save=saved_modules(self.adapters, whole.modules),
            task_type=kind if whole.with_head or kind not in CLASSIFIERS else None,
            transposed=any(a.config.get("fan_in_fan_out") for a in self.adapters),
            form=self.adapters[0].form,
            header=common_header([a.header for a in self.adapters]),
        )
        if frame.biases and (frame.embeddings or frame.parameters):
            other = "adapt embeddings" if frame.embeddings else "have target_parameters"
            raise AdapterError(
                f"some adapters have lora_bias and some {other}, which PEFT cannot have in one "
                "adapter: merge them apart."
            )
        return frame

    def task_frame(self, task: int) -> Frame:
        """One task's own, with its own head."""
        adapter = self.adapters[task]
        kind = adapter.config.get("task_type")
        return replace(
            self.frame(),
            biases=self._biases([task]),
            modules=adapter.modules,
            copies=adapter.copies,
            modules_to_save=saved_modules([adapter], adapter.modules),
            task_type=kind if head_of(adapter) or kind not in CLASSIFIERS else None,
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
        weights = self.config.spread(len(columns))
        sum_of = MergeConfig(weights=weights, layer_weights=self.config.layer_weights)
        summed = merge_layers(columns, sum_of)
        return {name: summed.dense(name)[:, 0] for name in shapes}


def is_file_output(output: str | Path) -> bool:
    """Whether an output is named as one file."""
    return Path(output).suffix == ".safetensors"


def write_with_record(folder: Path, file: Path, record: Mapping[str, Any]) -> None:
    """The diffusion model's file of a folder as one file, with a record in its header."""
    stored = folder / DIFFUSION
    header = read_metadata(stored) | {IN_HEADER: json.dumps(record, ensure_ascii=False)}
    write_tensors(
        file, {key: Planned.copy(item) for key, item in open_tensors(stored).items()}, header
    )


def require_free_for_file(
    output: str | Path, *, inputs: Iterable[Any] = (), overwrite: bool = False
) -> None:
    """Refuse an output of one file that is not free, unless it is ours and may be replaced.

    Raises:
        OutputError: it is there already, is an input or is inside one, or is a folder.
    """
    if Path(output).is_file() and not overwrite:
        require_apart(output, inputs)
        raise OutputError(
            f"the output '{output}' is there already: choose another, or replace what orthomerge "
            "wrote with --overwrite (overwrite=True)."
        )
    require_free_file(output, lambda file: IN_HEADER in read_metadata(file), inputs=inputs)


def distinct_names(adapters: Sequence[Adapter]) -> list[str]:
    """Each adapter's name, numbered where two would fall into one folder."""
    names: list[str] = []
    for adapter in adapters:
        name, number = adapter.name, 2
        while slug(name) in map(slug, names):
            name, number = f"{adapter.name}-{number}", number + 1
        names.append(name)
    return names


def _column(bias: Tensor) -> LoraFactors:
    return LoraFactors(bias.new_ones(1, 1), bias[:, None])


def _targets(adapters: Sequence[Adapter], key: str, names: Sequence[str]) -> list[str] | None:
    """The union of the adapters' targets of a kind where it means `names` and no others.

    It does where each is a plain list: PEFT adapts every module a list names, so an adapter has all
    of them. Else None, for the full names.
    """
    found: set[str] = set()
    for adapter in adapters:
        named = adapter.config.get(key)
        if named is None and (adapter.parameters or key == "target_parameters"):
            continue
        narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
        if not is_array(named) or any(adapter.config.get(key) for key in narrowed):
            return None
        found |= set(named)
    ends = tuple(f".{name}" for name in found)
    return sorted(found) if found and all(f".{n}".endswith(ends) for n in names) else None
