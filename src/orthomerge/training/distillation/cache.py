"""Teachers are run once: what each said of its texts, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from orthomerge.io.files import atomic_path, fingerprint, slug
from orthomerge.io.sealed import digest
from orthomerge.models.assets import ResolvedModel
from orthomerge.training.distillation.batches import Targets
from orthomerge.training.distillation.teachers import Teacher
from orthomerge.training.distillation.updates import Adder, added

_ROWS = 64


def teacher_key(teacher: Teacher, base: ResolvedModel, how: Mapping[str, Any]) -> str:
    """What a teacher's outputs depend on, as a hash."""
    return fingerprint(
        {
            "adapter": _content(teacher),
            "base": base.sha256,
            "texts": [list(text) for text in teacher.texts],
            **how,
        }
    )


def _content(teacher: Teacher) -> str:
    """A hash of the factors and the head: adapters in memory have no file."""
    tensors = dict(teacher.head)
    for name, factors in teacher.adapter.layers.items():
        tensors |= {f"{name}.A": factors.A, f"{name}.B": factors.B * factors.scaling}
    return digest(tensors)


def kept_file(folder: Path, teacher: Teacher, key: str) -> Path:
    """Where a teacher's outputs are kept."""
    return folder / f"{slug(teacher.name)}-{key[:16]}.safetensors"


def read_kept(file: Path, key: str) -> Targets | None:
    """A teacher's outputs, if the file is there, whole, and of this very question."""
    if not file.is_file():
        return None
    try:
        with cast(Any, safe_open(file, framework="pt")) as stream:
            if (stream.metadata() or {}).get("key") != key:
                return None
            held = {name: stream.get_tensor(name) for name in ("hidden", "counts", "answers")}
    except (SafetensorError, OSError):
        return None
    return Targets(held["hidden"], held["counts"].tolist(), held["answers"])


def keep(file: Path, key: str, targets: Targets) -> None:
    """Write a teacher's outputs, whole or not at all."""
    tensors = {
        "hidden": targets.hidden.contiguous(),
        "counts": torch.tensor(targets.counts),
        "answers": targets.answers.contiguous(),
    }
    with atomic_path(file) as path:
        save_file(tensors, path, metadata={"key": key})


def teach(
    form: Any,
    adder: Adder,
    task: int,
    teacher: Teacher,
    examples: Sequence[Mapping[str, Any]],
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Targets:
    """What a teacher says of its texts, in the base's own type."""
    update = added(teacher.adapter.layers, device)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    hidden: list[Tensor | None] = [None] * len(examples)
    answers: list[Tensor | None] = [None] * len(examples)
    with torch.no_grad(), adder.using(update):
        for at in range(0, len(order), _ROWS):
            piece = order[at : at + _ROWS]
            inputs = {
                k: v.to(device) for k, v in form.collate([examples[i] for i in piece]).items()
            }
            states = form.backbone.states(inputs)
            rows = torch.arange(len(piece), device=device)
            said = form.answers(task, states, inputs, rows)
            mask = inputs["attention_mask"].bool()
            for i, row in enumerate(piece):
                hidden[row] = states.last_hidden_state[i][mask[i]].cpu()
                answers[row] = said[i].cpu()
            if progress is not None:
                progress(len(piece))
    whole = [h for h in hidden if h is not None]
    return Targets(
        torch.cat(whole),
        [len(h) for h in whole],
        torch.stack([a for a in answers if a is not None]),
    )
