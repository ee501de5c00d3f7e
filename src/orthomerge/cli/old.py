"""Verbs of version 0.1 under their old names, hidden for one release: see `OLD_VERBS`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import Count, Json, Port
from orthomerge.cli.listing import list_
from orthomerge.cli.report import serve_runs
from orthomerge.cli.run import dry
from orthomerge.errors import RecipeError


@app.command(hidden=True)
def methods(json: Json = False) -> None:
    """The same as 'orthomerge list methods'."""
    list_("methods", json=json)


@app.command(hidden=True)
def solvers(json: Json = False) -> None:
    """The same as 'orthomerge list solvers'."""
    list_("solvers", json=json)


@app.command(hidden=True)
def tasks(
    export_harness: Path | None = None,
    task: list[str] | None = None,
    template: str | None = None,
    rows: int = 300,
    seed: int = 0,
    json: Json = False,
) -> None:
    """The same as 'orthomerge list tasks'."""
    list_("tasks", export_harness, task, template, rows, seed, json)


@app.command(hidden=True)
def plan(
    recipe: str,
    gpus: Count = 1,
    throughput: Path | None = None,
    measure: Annotated[bool, typer.Option("--measure")] = False,
    card: str = "h100",
    json: Json = False,
) -> None:
    """The same as 'orthomerge run RECIPE --dry-run --speed CARD --jobs GPUS'."""
    if measure and throughput:
        raise RecipeError("--measure and --throughput say the same thing twice: give one of them.")
    speed = "measure" if measure else str(throughput) if throughput else card
    dry(recipe, None, {}, speed=speed, jobs=gpus, json=json)


@app.command(hidden=True)
def board(folder: Annotated[Path, typer.Argument()] = Path("runs"), port: Port = 8765) -> None:
    """The same as 'orthomerge report FOLDER --serve'."""
    serve_runs(folder, port)


@app.command(hidden=True)
def card(folder: Path, results: Annotated[list[Path], typer.Option()], json: Json = False) -> None:
    """Write scores into a merge's model card; 'orthomerge eval --card' scores and writes at once.

    `results` are files of what 'orthomerge eval --json' printed; figures of a task that the card
    has already are replaced.
    """
    from orthomerge.records import add_scores, read_scores

    figures = add_scores(folder, read_scores(results))
    if json:
        print_json({"path": str(folder), "figures": [figure.model_dump() for figure in figures]})
        return
    written = ", ".join(figure.task for figure in figures)
    out.print(f"{folder / 'README.md'}: figures of {written}.", soft_wrap=True, highlight=False)
