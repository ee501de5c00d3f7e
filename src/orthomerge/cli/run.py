"""`orthomerge run` and `orthomerge demo`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, err, out, parse_options, print_json
from orthomerge.cli._progress import Quiet
from orthomerge.io.units import parse_size

if TYPE_CHECKING:
    from orthomerge.experiment.executors import Executor

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/<name>.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result rows as JSON.")]


@app.command()
def run(
    recipe: str,
    output: Output = None,
    base: str | None = None,
    change: Annotated[list[str] | None, typer.Option("--set")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
    speed: str | None = None,
    executor: str | None = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1)] = 1,
    memory: str | None = None,
    address: str | None = None,
    retries: Annotated[int, typer.Option(min=0)] = 2,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: statistics, starts, training, merging, scores and a page.

    Called again it goes on where it was stopped. Jobs run one after another, several at once
    (--jobs), or on a Ray cluster whose machines share the output folder; see docs/scale.md.

    Example: [bold]orthomerge run recipes/demo.yaml --output runs/demo --jobs 2[/]

    [bold]orthomerge run recipes/paper/roberta-large.yaml --base my-roberta/ --dry-run[/]

    Args:
        recipe: A recipe file, or one that comes along.
        base: Another base model: a folder, or a name as in the recipe.
        change: A key of the recipe and its value, as data.train=100; repeat.
        dry_run: Say what is left to do and what it takes; write nothing.
        speed: For --dry-run: h100, a100, l40s, rtx4090, 'measure', or an earlier run's run.json.
        executor: serial, process (with --jobs) or ray (a Ray cluster).
        jobs: Worker processes at once.
        memory: process: memory for the jobs at work, as 16GB; default what is free.
        address: ray: the cluster, 'auto' on one of its machines; default this machine.
        retries: Times a job is tried again when its worker died.
    """
    from orthomerge.errors import RecipeError

    changes = parse_options(change or [], "--set data.train=100") | ({"base": base} if base else {})
    if dry_run:
        dry(recipe, output, changes, speed=speed, jobs=jobs, json=json)
        return
    if speed is not None:
        raise RecipeError("--speed is for --dry-run: add it, or leave the speed out.")
    from orthomerge.experiment.executors import choose_executor

    chosen = choose_executor(
        _renamed(executor), jobs=jobs, memory=parse_size(memory) if memory else None,
        address=address,
    )  # fmt: skip
    _run(recipe, output, changes, json=json, executor=chosen, retries=retries)


def _renamed(executor: str | None) -> str | None:
    """The executor by its present name."""
    if executor != "local":
        return executor
    err.print("note: '--executor local' is now 'process', or nothing at all.", highlight=False)
    return None


@app.command()
def demo(output: Output = None, json: AsJson = False, quiet: Quiet = False) -> None:
    """Train and merge adapters of four real tasks in a few minutes, and show what merging cost.

    Example: [bold]orthomerge demo --output runs/demo[/]
    """
    _run("demo.yaml", output, {}, json=json)


def dry(
    source: str,
    output: Path | None,
    changes: Mapping[str, Any],
    *,
    speed: str | None,
    jobs: int,
    json: bool,
) -> None:
    """Print what is left to do of a recipe, and what it takes."""
    from orthomerge.cli._dry import describe
    from orthomerge.experiment import dry_run, load_recipe
    from orthomerge.experiment.preview import speed_of

    recipe, _ = load_recipe(source, changes)
    folder = output or Path("runs") / recipe.name
    found = dry_run(recipe, folder, speed=speed_of(speed) if speed else None, workers=jobs)
    if json:
        print_json({"name": recipe.name, "output": str(folder), **found.to_dict()})
        return
    for part in describe(recipe, folder, found):
        out.print(part, soft_wrap=isinstance(part, str), highlight=False)


def _run(
    source: str,
    output: Path | None,
    changes: Mapping[str, Any],
    *,
    json: bool,
    executor: Executor | None = None,
    retries: int = 2,
) -> None:
    from dataclasses import asdict

    from orthomerge.cli._run_progress import RunProgress
    from orthomerge.experiment import Run, load_recipe
    from orthomerge.report import (
        build_report,
        known_table,
        known_text,
        read_source,
        summary_table,
    )

    recipe, text = load_recipe(source, changes)
    folder = output or Path("runs") / recipe.name
    command = "orthomerge " + " ".join(sys.argv[1:])
    with RunProgress() as progress:
        job = Run(
            recipe, folder, text=text, command=command,
            reporter=progress, executor=executor, retries=retries,
        )  # fmt: skip
        progress.arm_tasks = job.arm_tasks
        rows = job.execute()
    page = build_report(folder)
    if json:
        print_json({"rows": [asdict(r) for r in rows], "report": str(page)})
        return
    record = read_source(folder)
    out.print(summary_table(rows, record.arm_tasks))
    if (beside := known_table(record)) is not None:
        out.print(known_text(beside))
    out.print(f"\nrows:  {folder / 'results.jsonl'}\npage:  {page.resolve()}", soft_wrap=True)
