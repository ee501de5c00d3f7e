"""A converted adapter trained a few steps more, with its record and its directions kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orthomerge.adapters import EXCLUDED, RECORD
from orthomerge.io.files import atomic_path
from orthomerge.records import record_of, seal_again
from orthomerge.tasks import Prompt, Row
from orthomerge.training.adapter import train_adapter
from orthomerge.training.settings import TrainingSettings


def recover_adapter(
    model: Any,
    converted: str | Path,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    regression: bool,
    settings: TrainingSettings,
    prompt: Prompt | None = None,
    seed: int = 0,
    output: str | Path,
    record: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train a converted adapter a few steps more, where its conversion put it; see `train_adapter`.

    `A` stays out of the directions that the conversion "project" left behind, and is held after any
    other. The conversion's own record goes along, with the hashes of what came out.

    Raises:
        OrthomergeError: a record that cannot be read, or what `train_adapter` raises.
    """
    converted = Path(converted)
    before = record_of(converted, RECORD) if (converted / RECORD).is_file() else None
    projected = (converted / EXCLUDED).is_file()
    with atomic_path(output) as folder:
        train_adapter(
            model, converted, rows, tokenizer, regression=regression, settings=settings,
            constraint="project" if projected else "freeze", fresh_head=False, seed=seed,
            output=folder, prompt=prompt, record=record, progress=progress,
        )  # fmt: skip
        for name in ("README.md", EXCLUDED):
            if (converted / name).is_file():
                shutil.copyfile(converted / name, folder / name)
        if before is not None:
            about = {"steps": settings.max_steps, **(record or {})}
            seal_again(before, folder, RECORD, recovered=about)
    return Path(output)
