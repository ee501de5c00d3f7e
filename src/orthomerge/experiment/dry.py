"""What a run would do: its jobs and rows, told without making, writing or downloading anything."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orthomerge.errors import AssetError
from orthomerge.experiment.graph import Graph
from orthomerge.experiment.keys import Keys
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.run import ROWS
from orthomerge.io.files import fingerprint, is_folder
from orthomerge.io.rows import ResultRow, read_rows
from orthomerge.models.assets import ResolvedModel, resolve_model
from orthomerge.models.wheels import is_here
from orthomerge.tasks import SUFFIXES, Task, TaskData, corpora, glue


@dataclass(frozen=True)
class DryRun:
    """What a recipe would do in its folder.

    `base` and `data` say where they are or would come from; `jobs` counts what is left to do by
    kind, `rows` the rows of the finished run, `there` those that exist.
    """

    base: str
    data: dict[str, str]
    jobs: dict[str, int]
    rows: int
    there: int


class _Unmade(Keys):
    """Keys of a recipe whose base or data are not here: right in number, not in value."""

    def __init__(self, recipe: Recipe, output: Path, base: ResolvedModel | None) -> None:
        super().__init__(recipe, output)
        name = recipe.base
        self.base = base or ResolvedModel(name, "hub", None, fingerprint(name), name)
        self.data = {task: TaskData([], [], [], fingerprint(task)) for task in self.tasks}


def dry_run(recipe: Recipe, output: str | Path) -> DryRun:
    """Check what can be checked on this machine and count what a run would do.

    The base is looked into where it is here; rows and pieces of an earlier sitting count where
    base and data are both here, since only then are they known to fit.

    Raises:
        AssetError: a folder for a base that is not there, or is not a model.
        UnknownNameError, SubspaceError: a target or a rank that does not fit the base.
        TaskError: a task's file that cannot be trained on.
    """
    keys = Keys(recipe, Path(output))
    base, where = _base(recipe.base)
    data = {name: _place(task) for name, task in keys.tasks.items()}
    rows: dict[str, ResultRow] = {}
    there: Callable[[Path], bool] = Path.exists
    if base is not None and all(place in _HERE for place in data.values()):
        keys.check()
        if (keys.output / ROWS).is_file():
            rows = {r.key: r for r in read_rows(keys.output / ROWS)}
    else:
        keys = _Unmade(recipe, Path(output), base)
        there = _nothing
        if base is not None:
            keys.check_base()
    graph = Graph(keys)
    asked = graph.evaluations(rows, assume=True)
    wanted = {key for evaluation in asked for _, key in evaluation.keys}
    jobs = Counter(job.kind for job in graph.jobs(asked, rows, there).values())
    return DryRun(where, data, dict(jobs), len(wanted), len(wanted & set(rows)))


def _nothing(_path: Path) -> bool:
    return False


def _base(name: str) -> tuple[ResolvedModel | None, str]:
    try:
        found = resolve_model(name, fetch=False)
    except AssetError:
        if name.startswith((".", "~", "/")) or is_folder(name):
            raise
        return None, (
            "would be downloaded from the hub" if "/" in name else "would be fetched with pip"
        )
    return found, {"path": "a folder", "package": "a package, here", "hub": "here, from the hub"}[
        found.source
    ]


_HERE = ("a file", "a folder", "a package, here")


def _place(task: Task) -> str:
    """Where a task's rows are or would come from."""
    if task.source.endswith(SUFFIXES) and Path(task.source).is_file():
        return "a file"
    if task.name.startswith("glue/"):
        named = os.environ.get(glue.FOLDER_VARIABLE)
        return "a folder" if named else "would be downloaded from the hub"
    return "a package, here" if is_here(corpora.PACKAGE) else "would be fetched with pip"
