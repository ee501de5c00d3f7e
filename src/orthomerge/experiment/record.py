"""What a run says about itself: versions, machine, base, tasks, time of each stage."""

from __future__ import annotations

import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orthomerge.experiment.measured import Costs
from orthomerge.io.documents import is_object, read_json
from orthomerge.io.files import write_json
from orthomerge.models.assets import ResolvedModel
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
        if isinstance(v, int | float) and math.isfinite(v)
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
