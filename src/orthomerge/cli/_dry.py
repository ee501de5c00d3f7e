"""What `orthomerge run --dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orthomerge.cli._app import table
from orthomerge.experiment import DryRun, Recipe
from orthomerge.io.units import human_duration, human_size


def describe(recipe: Recipe, output: Path, found: DryRun) -> Iterator[str | Table]:
    """Base, data, arms and what is left to do, a line or a table at a time."""
    yield f"[bold]{escape(recipe.name)}[/] is valid; nothing is made, written or downloaded."
    size = f"; {_count(found.parameters)} parameters by {found.shapes}" if found.parameters else ""
    yield f"base:    {escape(recipe.base)} ({found.base}{size})"
    places: dict[str, list[str]] = {}
    for task, place in found.data.items():
        places.setdefault(place, []).append(task)
    for place, tasks in places.items():
        yield f"tasks:   {escape(', '.join(tasks))} ({place})"
    yield f"output:  {escape(str(output))}"
    yield _arms(recipe)
    if found.kinds:
        yield _kinds(found)
    yield f"rows:    {found.rows}" + (f", {found.there} of them there" if found.there else "")
    if not found.kinds:
        yield "to do:   nothing"
    elif found.speed is None:
        yield f"time, disk and memory are not known: {escape(found.why)}"
    else:
        workers = f"{found.workers} worker{'s' if found.workers > 1 else ''}"
        yield f"time:    {human_duration(found.wall_seconds)} on {workers}"
        yield f"speed:   {escape(found.speed.source)}"


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def _kinds(found: DryRun) -> Table:
    jobs = table("to do", "jobs", "time", "disk", "peak memory")
    for kind, k in (*found.kinds.items(), ("all", found.total)):
        takes = (human_duration(k.seconds), human_size(k.disk), human_size(k.memory))
        jobs.add_row(kind, str(k.jobs), *(takes if found.speed else ("?",) * 3))
    return jobs


def _arms(recipe: Recipe) -> Table:
    arms = table(
        "arm", "start", "constraint", "granularity", "rank", "targets", "tasks", "rates", "seeds",
        numbers=False,
    )  # fmt: skip
    for name, arm in recipe.arms.items():
        shape = recipe.adapter_of(name)
        about = (
            name, arm.start, arm.constraint, arm.granularity if arm.solver else "", str(shape.rank),
            " ".join(shape.targets), str(len(recipe.tasks_of(name))),
            " ".join(f"{rate:g}" for rate in recipe.learning_rates_of(name)),
            " ".join(map(str, recipe.seeds_of(name))),
        )  # fmt: skip
        arms.add_row(*map(Text, about))
    return arms
