"""What `orthomerge run --dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orthomerge.experiment import DryRun, Recipe

_JOBS = {
    "stats": "statistics", "start": "starts", "train": "trainings", "fisher": "Fisher information",
    "eval": "evaluations of adapters alone", "merge": "merges, each scored on every task",
}  # fmt: skip


def describe(recipe: Recipe, output: Path, found: DryRun) -> Iterator[str | Table]:
    """Base, data, arms and jobs, a line or a table at a time."""
    yield f"[bold]{escape(recipe.name)}[/] is valid; nothing is made, written or downloaded."
    yield f"base:    {escape(recipe.base)} ({found.base})"
    places: dict[str, list[str]] = {}
    for task, place in found.data.items():
        places.setdefault(place, []).append(task)
    for place, tasks in places.items():
        yield f"tasks:   {escape(', '.join(tasks))} ({place})"
    yield f"output:  {escape(str(output))}"
    yield _arms(recipe)
    left = ", ".join(f"{found.jobs[k]} {name}" for k, name in _JOBS.items() if k in found.jobs)
    yield f"to do:   {left or 'nothing'}"
    yield f"rows:    {found.rows}" + (f", {found.there} of them there" if found.there else "")


def _arms(recipe: Recipe) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    heads = ("arm", "start", "constraint", "granularity", "rank", "targets", "tasks", "rates",
             "seeds")  # fmt: skip
    for head in heads:
        table.add_column(head, overflow="fold")
    for name, arm in recipe.arms.items():
        shape = recipe.adapter_of(name)
        table.add_row(
            *map(
                Text,
                (
                    name,
                    arm.start,
                    arm.constraint,
                    arm.granularity if arm.solver else "",
                    str(shape.rank),
                    " ".join(shape.targets),
                    str(len(recipe.tasks_of(name))),
                    " ".join(f"{rate:g}" for rate in recipe.learning_rates_of(name)),
                    " ".join(map(str, recipe.seeds_of(name))),
                ),
            )
        )
    return table
