"""What a run says about itself (`run.json`), and its scores in the cards of its merges."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from orthomerge.errors import AdapterError
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.measured import Costs
from orthomerge.experiment.steps import MergeStep, Scoring
from orthomerge.io.documents import is_object, read_json
from orthomerge.io.files import write_json
from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.models.assets import ResolvedModel
from orthomerge.records import CardScore, add_scores
from orthomerge.tasks import Task

_PACKAGES = ("orthomerge", "torch", "transformers", "peft", "accelerate", "numpy")


def write_record(
    path: Path,
    about: dict[str, Any],
    base: ResolvedModel,
    tasks: list[Task],
    costs: Costs,
) -> None:
    """Write `run.json`; what each stage took adds up over the sittings of a run."""
    before = _before(path)
    total = Costs(*(_numbers(before, k) for k in ("seconds", "peak_memory", "peak_gpu_memory")))
    total.add(costs)
    record = {
        **about,
        "version": version("orthomerge"),
        "versions": {p: version(p) for p in _PACKAGES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {sys.platform}",
        "started": before.get("started", about["started"]),
        "base": {"id": about["base"], "source": base.source, "sha256": base.sha256},
        "tasks": [_about(task) for task in tasks],
        "seconds": {stage: round(value, 1) for stage, value in total.seconds.items()},
        "peak_memory": total.memory,
        **({"peak_gpu_memory": total.gpu_memory} if total.gpu_memory else {}),
    }
    write_json(path, record)


def _before(path: Path) -> dict[str, Any]:
    """The record of the sittings before; one that cannot be read is begun anew."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if is_object(found) else {}


def _numbers(record: dict[str, Any], key: str) -> dict[str, Any]:
    """The finite numbers of a mapping of the record; others are begun anew."""
    found = record.get(key)
    return {
        k: v for k, v in (found if is_object(found) else {}).items()
        if isinstance(v, int | float) and isfinite(v)
    }  # fmt: skip


def _about(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "title": task.title,
        "kind": task.kind,
        "metric": task.metric,
        "licence": task.licence,
        "source": task.source,
        "made": task.made,
    }


def write_scores(exp: Experiment, asked: Iterable[Scoring], rows: Sequence[ResultRow]) -> None:
    """Write what every kept merge scored on test rows into its card, beside each task alone."""
    by_key = {row.key: row for row in rows}
    alone = {
        (row.arm, row.seed, row.task): row.value
        for row in rows
        if row.method == SINGLE and row.split == "test"
    }
    for step in asked:
        if not isinstance(step, MergeStep) or step.split != "test":
            continue
        folder = step.folder(exp)
        scored = [by_key[key] for key in exp.row_keys(step).values() if key in by_key]
        scores = [_score(exp, row, alone) for row in scored if isfinite(row.value)]
        if folder.is_dir() and scores:
            # One that was altered is for 'orthomerge verify' to report; the run continues.
            with suppress(AdapterError):
                add_scores(folder, scores)


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _score(exp: Experiment, row: ResultRow, alone: dict[tuple[str, int, str], float]) -> CardScore:
    return CardScore(
        task=row.task,
        metric=row.metric,
        value=row.value,
        n=row.n,
        alone=_finite(alone.get((row.arm, row.seed, row.task))),
        majority=_finite(row.majority),
        by=f"the run {exp.recipe.name} (arm {row.arm}, seed {row.seed})",
    )
