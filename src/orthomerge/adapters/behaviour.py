"""Whether a merge behaves as its record says: its outputs, loaded anew, beside those it must have.

The truth is worked out without PEFT and without the written files: the base's weights with the
record's merge of the adapters added to them, densely.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from orthomerge import linalg
from orthomerge.adapters import as_user
from orthomerge.adapters.align import align_adapters
from orthomerge.adapters.architecture import architectures_of
from orthomerge.adapters.base import find_base
from orthomerge.adapters.files import Adapter, common_base, read_adapter
from orthomerge.adapters.heads import head_of, is_head, label_count
from orthomerge.adapters.keys import PREFIX
from orthomerge.adapters.merge import prepare_merge
from orthomerge.adapters.output import distinct_names
from orthomerge.adapters.redo import config_of, inputs_of, named, recorded_base
from orthomerge.adapters.tokenizers import tokenizer_of
from orthomerge.adapters.write import Frame
from orthomerge.errors import AdapterError, MergeError
from orthomerge.factors import LoraFactors
from orthomerge.io.files import slug
from orthomerge.io.names import CONFIG, HEAD, HEADS, MERGE, TASKS
from orthomerge.io.tensors import (
    FLOATS,
    Planned,
    open_tensors,
    read_tensor,
    shapes_of,
    write_tensors,
)
from orthomerge.merging import Update, plan_merge
from orthomerge.models.loading import encode, load_tokenizer, quiet
from orthomerge.models.modules import is_transposed, layer_of
from orthomerge.records import Recorded
from orthomerge.statistics import read_texts, sample_texts

TOLERANCE, HALF_TOLERANCE = 0.02, 0.1
"""How far outputs may be from the truth, in parts of what the merge changes; in 16 bits."""
_ROUNDING = 1e-3
NIL = 1e-5
"""A change of the outputs, in parts of their size, that is none."""
LIKE_BASE = 0.05
"""A change, in parts of the one that is wanted, at which an output behaves like the base."""


class TaskBehaviour(NamedTuple):
    """One task's part of what was found, on its texts.

    `difference` is `‖merged - truth‖ / ‖truth - base‖` of the outputs, None where no record says
    what the truth is; `change` is `‖merged - base‖` over the same. `agreement` is the share of
    texts with the same largest logit as the task's own adapter has, `base_agreement` the base's
    under that adapter's head; None where outputs are no classes. `cosine` is that of the merge's
    change of the outputs and the adapter's own.
    """

    task: str
    difference: float | None
    change: float
    agreement: float | None
    base_agreement: float | None
    cosine: float | None


@dataclass(frozen=True)
class Behaviour:
    """What a merge's outputs are: as they must be (`good`), a sentence on it, and each task's."""

    good: bool
    said: str
    tasks: tuple[TaskBehaviour, ...] = ()


class _Seen(NamedTuple):
    """Outputs `[texts, values]` of one task: the merge's, the base's, the truth, the adapter's own.

    `own_dense` is the adapter's own as its factors are read here, without PEFT; `own_base` the
    base's under the adapter's own head, as `base` is under the merge's.
    """

    merged: Tensor
    base: Tensor
    truth: Tensor | None
    own: Tensor
    own_dense: Tensor
    own_base: Tensor

    @property
    def wanted(self) -> Tensor:
        """The change of the base's outputs that the record says, or the adapter's own."""
        return self.own - self.own_base if self.truth is None else self.truth - self.base


def verify_outputs(
    path: str | Path,
    texts: Sequence[str | Path],
    *,
    adapters: Sequence[str | Path] = (),
    base: str | None = None,
    samples: int = 100,
    max_length: int = 128,
    text_column: str = "text",
    tolerance: float | None = None,
) -> Behaviour:
    """Use when a merge seems wrong, as when "the merged model behaves like the base".

    The output is loaded as its user does, an adapter by PEFT and a full model by Transformers, in a
    fresh process, and so is each adapter. Their outputs on the texts are held against the base's
    with the updates that the record says. `good` is False where the output cannot be loaded, where
    PEFT takes none or not all of its tensors, where it behaves like the base, where it is something
    else than its record says, and where an adapter is not read here as PEFT reads it.

    Args:
        path: an adapter's or a model's folder. Without a `merge.json`, as where another program
            merged, it is held against the base and the adapters alone.
        texts: files of texts or data sets, one for all tasks or one per adapter.
        adapters: the adapters that went in, in their order; by default where the record says.
        base: the base model, where it is elsewhere than the record says.
        samples: texts taken of each file.
        max_length: tokens of a text.
        text_column: of the files.
        tolerance: the largest `TaskBehaviour.difference` that is good; 0.02, or 0.1 where weights
            are stored in 16 bits.

    Raises:
        AdapterError: no merge there, adapters or a base that are not here or do not fit, added
            tokens, or a layer that is no module of the model, as a packed expert.
        StatisticsError: texts that cannot be read.
    """
    path = Path(path)
    merge = _Merge.of(path, adapters, base)
    if len(texts) not in (1, len(merge.adapters)):
        raise MergeError(
            f"{len(texts)} files of texts for {len(merge.adapters)} adapters: give one for all, or "
            "one per adapter, in their order."
        )
    drawn = [sample_texts(read_texts(t, text_column=text_column), samples, 0) for t in texts]
    inputs = merge.encoded([text for one in drawn for text in one], max_length)
    parts = _slices([len(one) for one in drawn], len(merge.adapters))
    outputs, said = _in_fresh_process(merge.runs(), inputs)
    problem = _not_loaded(said, merge, path)
    if problem is not None:
        return Behaviour(False, problem)
    seen = [
        _Seen(*(None if x is None else x[part] for x in one))  # pyright: ignore[reportArgumentType]
        for one, part in zip(merge.seen(outputs, inputs), parts, strict=True)
    ]
    tasks = tuple(map(_compared, merge.names, seen))
    files = (open_tensors(file).values() for file in path.glob("*.safetensors"))
    half = any(item.dtype not in FLOATS[:2] for stored in files for item in stored)
    wrong = _wrong(merge, seen, tasks, tolerance or (HALF_TOLERANCE if half else TOLERANCE), half)
    if wrong is not None:
        return Behaviour(False, wrong, tasks)
    if merge.truth is None:
        return Behaviour(True, "it changes the base; no record says what it must be", tasks)
    most = max(t.difference or 0.0 for t in tasks)
    return Behaviour(
        True, f"it is what its record says, to {most:.2%} of what the merge changes", tasks
    )


class _Merge:
    """What was merged, as far as it can be known, and how each model is loaded.

    `truth` has the merge of one layer and `frame` what belongs beside the layers, where a record
    says how they come about.
    """

    def __init__(
        self, path: Path, found: Recorded | None, read: Sequence[Adapter], base: str | None
    ) -> None:
        record = found.record if found else {}
        self.path, self.frame, self.truth = path, Frame(None), None
        self.model = not (path / CONFIG).is_file() and not record.get("own_adapters")
        if found and "distilled" not in record:
            plan, layers, given = prepare_merge(
                read, config_of(record, found.entries, base), **inputs_of(record, path)
            )
            self.adapters, self.frame = plan.adapters, plan.frame(room_for_head=self.model)
            self.truth = plan_merge(layers, plan.config, **given)
        else:
            self.adapters = align_adapters(read, base=base)
        kept = record.get("heads") == "keep"
        heads = [entry.get("head") if kept else None for entry in (found.entries if found else ())]
        self._heads = [
            path / HEADS / f"{slug(str(h['name']))}{HEAD}" if h else None for h in heads
        ] or [None] * len(self.adapters)
        self._own: list[str] = [slug(str(name)) for name in record.get("own_adapters") or ()]
        self.names = [str(e.get("name")) for e in found.entries] if found else []
        self.names = self.names or distinct_names(self.adapters)
        self.base = Path(find_base(base or common_base(self.adapters)[0]).path_or_id)
        self.kind = self._class()
        if any(a.copies for a in self.adapters):
            raise AdapterError(
                "outputs of adapters with rows for added tokens are not compared: resize the "
                "base's embeddings and compare the logits yourself."
            )

    @classmethod
    def of(cls, path: Path, adapters: Sequence[str | Path], base: str | None) -> _Merge:
        """The merge at `path`, by its record, or by the `adapters` where it has none."""
        if not path.is_dir():
            raise AdapterError(f"there is no folder '{path}': name what 'orthomerge merge' wrote.")
        found = Recorded.of(path, adapters) if (path / MERGE).is_file() else None
        if found is None:
            if not adapters:
                raise AdapterError(
                    f"'{path}' has no {MERGE}, so nothing says what was merged: name the adapters "
                    "with --against (adapters=...)."
                )
            return cls(path, None, [read_adapter(a, base=base) for a in adapters], base)
        base = base or recorded_base(found.record, path)
        pairs = zip(found.entries, found.places, strict=True)
        return cls(path, found, [named(e, p, base) for e, p in pairs], base)

    def _class(self) -> str:
        """The class of Transformers whose layers have the adapters' names."""
        layers = [f"{layer}.weight" for a in self.adapters for layer in a.layers]
        kinds = [a.config.get("task_type") for a in self.adapters]
        for shape in architectures_of(self.base, dict.fromkeys(kinds)):
            if all(layer in shape.shapes for layer in layers):
                return shape.called
        raise AdapterError(
            f"no class of the base '{self.base}' has all layers that the adapters name, as "
            f"'{layers[0]}': outputs are compared for layers that are modules of the model."
        )

    def encoded(self, texts: Any, max_length: int) -> dict[str, Tensor]:
        """All texts in tokens, padded on the right to the longest."""
        tokenizer = load_tokenizer(str(tokenizer_of(self.adapters) or self.base))
        found = encode(tokenizer, texts, max_length)
        padded = tokenizer.pad(found, padding_side="right", return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    @property
    def shared(self) -> bool:
        """Whether all tasks have one model, head and all."""
        return not self._own and not any(self._heads)

    def runs(self) -> dict[str, dict[str, Any]]:
        """What the fresh process loads: the merge, per task where they differ, and each adapter."""
        runs: dict[str, dict[str, Any]] = {}
        for i in range(1 if self.shared else len(self.adapters)):
            folder = self.path / TASKS / self._own[i] if self._own else self.path
            head = None if self._own else self._heads[i]
            runs[f"merged.{i}"] = {
                "kind": self.kind,
                "model": str(folder if self.model else self.base),
                "adapter": None if self.model else str(folder),
                "head": str(head) if head else None,
                "labels": self._labels(i) if head or not self.model else None,
            }
        for i, adapter in enumerate(self.adapters):
            runs[f"adapter.{i}"] = {
                "kind": self.kind,
                "model": str(self.base),
                "adapter": str(adapter.path),
                "head": None,
                "labels": _labels_of(adapter.modules, adapter),
            }
        return runs

    def _labels(self, task: int) -> int | None:
        own = self.frame.modules if self.shared and self.truth else self.adapters[task].modules
        return _labels_of(own, self.adapters[task])

    def seen(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[_Seen]:
        """Every task's outputs, those of dense models worked out here."""
        found: list[_Seen] = []
        dense: tuple[Tensor, Tensor | None] | None = None
        for i, adapter in enumerate(self.adapters):
            if dense is None or not self.shared:
                dense = self._dense_merge(i, inputs)
            labels, modules = _labels_of(adapter.modules, adapter), adapter.modules
            own = self._dense(labels, modules, adapter.layers.items(), adapter.biases, inputs)
            plain = dense[0]
            if self.shared and head_of(adapter):
                plain = self._dense(labels, head_of(adapter), (), {}, inputs)
            merged = outputs[f"merged.{0 if self.shared else i}"]
            found.append(_Seen(merged, *dense, outputs[f"adapter.{i}"], own, plain))
        return found

    def _dense_merge(self, task: int, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The outputs of the base under a task's head, and those of the merge as it must be."""
        adapter, labels = self.adapters[task], self._labels(task)
        head = head_of(adapter)
        if self.shared and self.truth:
            head = {n: t for n, t in self.frame.modules.items() if is_head(n, adapter)}
        elif self.shared:  # the one that another program left in its files, where it did
            files = [open_tensors(file) for file in self.path.glob("*.safetensors")]
            held = {k.removeprefix(PREFIX): item for file in files for k, item in file.items()}
            head = {n: read_tensor(held[n]) if n in held else t for n, t in head.items()}
        base = self._dense(labels, head, (), {}, inputs)
        if self.truth is None:
            return base, None
        merged = (self.truth.merge(name) for name in self.truth.names)
        updates = ((m.name, m.tasks[task] if m.tasks else m.update) for m in merged)
        whole = {**self.frame.modules, **head}
        return base, self._dense(labels, whole, updates, self.frame.biases, inputs)

    def _dense(
        self,
        labels: int | None,
        modules: Mapping[str, Tensor],
        updates: Iterable[tuple[str, Update]],
        biases: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> Tensor:
        """Outputs of the base with whole tensors in place of its own and updates added."""
        with quiet():
            model, _ = as_user.load(self.kind, str(self.base), labels=labels, head=modules)
        for name, update in updates:
            _add(model, name, update)
        for name, bias in biases.items():
            layer: Any = layer_of(model, name)
            before = 0.0 if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter(before + bias.to(layer.weight))
        return as_user.outputs(model, inputs)


def _labels_of(modules: Mapping[str, Tensor], adapter: Adapter) -> int | None:
    return label_count(shapes_of(modules), adapter.config.get("task_type"))


def _add(model: nn.Module, name: str, update: Update) -> None:
    """`W + ΔW` in the place of a layer's weight, which is of this layer alone from then on."""
    layer: Any = layer_of(model, name)
    delta = update.delta() if isinstance(update, LoraFactors) else update
    if is_transposed(layer) or isinstance(layer, nn.Embedding):
        delta = delta.T
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(weight + delta.to(weight).reshape(weight.shape))


def _slices(counts: Sequence[int], tasks: int) -> list[slice]:
    """Which rows of all texts are each task's: its file's, or all."""
    if len(counts) < tasks:
        return [slice(None)] * tasks
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _in_fresh_process(
    runs: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The outputs of every run, and what was said of its loading."""
    with tempfile.TemporaryDirectory(prefix="orthomerge-") as name:
        job = Path(name)
        (job / "job.json").write_text(json.dumps(runs), encoding="utf-8")
        planned = {name: Planned.tensor(tensor) for name, tensor in inputs.items()}
        write_tensors(job / "inputs.safetensors", planned)
        done = subprocess.run(
            [sys.executable, "-P", as_user.__file__, str(job)],
            capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it was ended"])[-1]
            raise AdapterError(f"the models could not be run in a process of their own: {last}.")
        said = json.loads((job / "said.json").read_text(encoding="utf-8"))
        found = open_tensors(job / "out.safetensors")
        return {name: read_tensor(item) for name, item in found.items()}, said


def _not_loaded(said: Mapping[str, Any], merge: _Merge, path: Path) -> str | None:
    """Why the output, or an adapter, does not load whole; None where it does."""
    for name, found in said.items():
        kind, _, number = name.partition(".")
        called = str(path) if kind == "merged" else merge.adapters[int(number)].called
        if "error" in found:
            return f"'{called}' cannot be loaded ({found['error']})"
        odd, missing = found["unexpected"], found["missing"]
        held = f"the file holds {len(odd)} others, as '{odd[0]}'" if odd else "the file has none"
        if len(missing) == found["wanted"]:
            return (
                f"'{called}' behaves like the base: PEFT finds in it none of the {len(missing)} "
                f"tensors it looks for, as '{missing[0]}'; {held}"
            )
        if missing:
            return (
                f"'{called}' does not load whole: PEFT does not find {len(missing)} of "
                f"{found['wanted']} tensors, as '{missing[0]}'; {held}"
            )
        if odd and kind == "merged":
            return (
                f"'{called}' does not load whole: no layer takes {len(odd)} of its tensors; {held}"
            )
    return None


def _compared(task: str, seen: _Seen) -> TaskBehaviour:
    merged, base, truth, own, _, own_base = seen
    alike = merged.shape == own.shape
    size = float(linalg.vector_norm(seen.wanted)) or 1.0
    classes = alike and merged.shape[1] > 1
    cosine = None
    if alike:
        changes = (merged - base).flatten(), (own - own_base).flatten()
        cosine = float(F.cosine_similarity(*changes, dim=0))
    return TaskBehaviour(
        task,
        None if truth is None else float(linalg.vector_norm(merged - truth)) / size,
        float(linalg.vector_norm(merged - base)) / size,
        _agreement(merged, own) if classes else None,
        _agreement(own_base, own) if classes else None,
        cosine,
    )


def _agreement(one: Tensor, other: Tensor) -> float:
    return float((one.argmax(dim=1) == other.argmax(dim=1)).float().mean())


def _wrong(
    merge: _Merge,
    seen: Sequence[_Seen],
    tasks: Sequence[TaskBehaviour],
    tolerance: float,
    half: bool,
) -> str | None:
    """What is wrong, in a sentence; None where nothing is."""
    for adapter, one in zip(merge.adapters, seen, strict=True):
        if float(linalg.vector_norm(one.own - one.own_dense)) > _ROUNDING * float(
            linalg.vector_norm(one.own_dense)
        ):
            return (
                f"'{adapter.called}' behaves in PEFT unlike the update that orthomerge reads in "
                "it: this is a fault of orthomerge; please report it"
            )
    nil = [
        float(linalg.vector_norm(one.wanted)) <= NIL * float(linalg.vector_norm(one.base))
        for one in seen
    ]
    if all(nil):
        return (
            "the merge behaves like the base, because what was merged changes nothing: the updates "
            "of the adapters are zero on these texts; look at their training"
        )
    still = [
        t.task for t, none in zip(tasks, nil, strict=True) if not none and t.change < LIKE_BASE
    ]
    if still:
        by = "its record" if merge.truth else "the adapter"
        why = "; it is stored in 16 bits, which round small updates away" if half else ""
        return (
            f"the merged output behaves like the base: for '{still[0]}' it changes outputs by "
            f"{min(t.change for t in tasks):.1%} of what {by} says{why}"
        )
    worst = max(tasks, key=lambda t: t.difference or 0.0)
    if (worst.difference or 0.0) > tolerance:
        one = seen[list(tasks).index(worst)]
        return (
            f"the merged output is not what its record says: for '{worst.task}' its outputs differ "
            f"by {worst.difference:.1%} of what the merge changes{_scale(one)}"
        )
    return None


def _scale(seen: _Seen) -> str:
    """The number by which the change is too large or too small, where that is all."""
    assert seen.truth is not None
    is_, must = (seen.merged - seen.base).flatten(), (seen.truth - seen.base).flatten()
    times = float(is_ @ must / (must @ must))
    left = float(linalg.vector_norm(is_ - times * must) / linalg.vector_norm(is_))
    return f", as {times:.2g} times the update would" if left < 0.1 else ""
