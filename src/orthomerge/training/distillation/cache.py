"""Teachers are run once: what each said of its texts, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orthomerge.io.documents import is_array, parse_json
from orthomerge.io.files import atomic_path, fingerprint, slug
from orthomerge.io.sealed import digest
from orthomerge.io.tensors import write_tensors
from orthomerge.models.assets import ResolvedModel
from orthomerge.training.distillation.forms import Example, Installed, Taught
from orthomerge.training.distillation.teachers import Teacher
from orthomerge.training.distillation.updates import added

_ROWS = 32
_TENSORS = ("hidden", "counts", "answers")


def teacher_key(teacher: Teacher, base: ResolvedModel, how: Mapping[str, Any]) -> str:
    """What a teacher's outputs depend on, as a hash."""
    tensors = dict(teacher.head)
    for name, factors in teacher.adapter.layers.items():
        tensors |= {f"{name}.A": factors.A, f"{name}.B": factors.B * factors.scaling}
    texts = [list(text) for text in teacher.texts]
    return fingerprint({"adapter": digest(tensors), "base": base.sha256, "texts": texts, **how})


def kept_file(folder: Path, teacher: Teacher, key: str) -> Path:
    """Where a teacher's outputs are kept."""
    return folder / f"{slug(teacher.name)}-{key[:16]}.safetensors"


def read_kept(file: Path, key: str) -> Taught | None:
    """A teacher's outputs, if the file is there, whole, and of this very question."""
    if not file.is_file():
        return None
    try:
        with cast(Any, safe_open(file, framework="pt")) as stream:
            said: dict[str, str] = stream.metadata() or {}
            if said.get("key") != key:
                return None
            held = {name: stream.get_tensor(name) for name in _TENSORS}
            examples = parse_json(said["examples"])
    except (SafetensorError, OSError, LookupError, ValueError):
        return None
    if not is_array(examples):
        return None
    return Taught(list(examples), held["hidden"], held["counts"].tolist(), held["answers"])


def keep(file: Path, key: str, taught: Taught) -> None:
    """Write a teacher's outputs, whole or not at all."""
    tensors = {
        "hidden": taught.hidden.contiguous(),
        "counts": torch.tensor(taught.counts),
        "answers": taught.answers.contiguous(),
    }
    with atomic_path(file) as path:
        write_tensors(path, tensors, {"key": key, "examples": json.dumps(taught.examples)})


def teach(
    where: Installed, task: int, teacher: Teacher, progress: Callable[[int], None] | None = None
) -> Taught:
    """What a teacher says of its texts; hidden states in the type that the base computes in."""
    form, adder, device = where
    read = form.read(task, teacher.texts)
    order = sorted(range(len(read)), key=lambda i: len(read[i]["input_ids"]))
    examples: dict[int, Example] = {}
    hidden: dict[int, Tensor] = {}
    answers: dict[int, Tensor] = {}
    with torch.no_grad(), adder.using(added(teacher.adapter.layers, device)):
        for at in range(0, len(order), _ROWS):
            chunk = order[at : at + _ROWS]
            written = form.written([read[i] for i in chunk])
            inputs = {k: v.to(device) for k, v in form.collate(written).items()}
            states = form.backbone.states(inputs)
            said, mask = form.answers(task, states, inputs), form.counted(inputs)
            for i, row in enumerate(chunk):
                examples[row] = _plain(written[i])
                hidden[row] = states.last_hidden_state[i][mask[i]].cpu()
                answers[row] = said[i].cpu()
            if progress is not None:
                progress(len(chunk))
    rows: Sequence[int] = range(len(read))
    return Taught(
        [examples[r] for r in rows],
        torch.cat([hidden[r] for r in rows]),
        [len(hidden[r]) for r in rows],
        torch.cat([answers[r] for r in rows]),
    )


def _plain(example: Mapping[str, Any]) -> Example:
    """An example as JSON has it."""
    return {k: v if isinstance(v, int) else [int(x) for x in v] for k, v in example.items()}
