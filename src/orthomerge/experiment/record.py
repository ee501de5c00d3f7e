"""What a run says about itself: versions, machine, base, tasks, time of each stage."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orthomerge.assets import ResolvedModel
from orthomerge.files import write_json
from orthomerge.tasks import Task

_PACKAGES = ("orthomerge", "torch", "transformers", "peft", "accelerate", "numpy")


def write_record(
    path: Path,
    about: dict[str, Any],
    base: ResolvedModel,
    tasks: list[Task],
    seconds: dict[str, float],
) -> None:
    """Write `run.json`; the time of each stage adds up over the sittings of a run."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    total = dict(before.get("seconds", {}))
    for stage, value in seconds.items():
        total[stage] = round(total.get(stage, 0.0) + value, 1)
    record = {
        **about,
        "version": version("orthomerge"),
        "versions": {p: version(p) for p in _PACKAGES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {sys.platform}",
        "started": before.get("started", about["started"]),
        "base": {"id": about["base"], "source": base.source, "sha256": base.sha256},
        "tasks": [_about(task) for task in tasks],
        "seconds": total,
    }
    write_json(path, record)


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
