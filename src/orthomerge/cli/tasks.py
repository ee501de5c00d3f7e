"""`orthomerge tasks`: what there is, and its rows for lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import Json
from orthomerge.errors import RecipeError


@app.command()
def tasks(
    export_harness: Annotated[
        Path | None,
        typer.Option(
            help="Write test rows as tasks of lm-evaluation-harness into this folder instead."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task to export, or a table of yours; repeat; default all offline."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="An instruction with {text}, or a .txt or YAML file of one."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Test rows of an exported task.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the rows.")] = 0,
    json: Json = False,
) -> None:
    """The labelled tasks that come along, how they are made and under what licence.

    As tasks of the harness: [bold]orthomerge tasks --export-harness tasks/ --task sentiment[/]
    """
    if export_harness is not None:
        _export(export_harness, task or [], template, rows, seed, as_json=json)
        return
    if task or template:
        raise RecipeError("--task and --template go with --export-harness, which writes them.")
    from rich.table import Table

    from orthomerge.tasks import list_tasks

    found = list_tasks()
    if json:
        print_json(
            [
                {"name": t.name, "title": t.title, "kind": t.kind, "labels": list(t.labels),
                 "metric": t.metric, "source": t.source, "licence": t.licence, "made": t.made}
                for t in found
            ]
        )  # fmt: skip
        return
    table = Table(title="tasks")
    for column in ("task", "what", "metric", "how it is made", "licence"):
        table.add_column(column, overflow="fold")
    for t in found:
        table.add_row(f"[bold]{t.name}[/]", t.title, t.metric, t.made, t.licence)
    out.print(table)


def _export(
    folder: Path, names: list[str], template: str | None, rows: int, seed: int, *, as_json: bool
) -> None:
    """Tasks as files of the harness; by default every classification that needs no hub."""
    from orthomerge.evaluation.harness import export_task
    from orthomerge.tasks import get_task, list_tasks, prompt_of

    chosen = [get_task(name) for name in names] or [
        t for t in list_tasks() if t.labels and not t.name.startswith("glue/")
    ]
    prompts = [prompt_of(task, template) for task in chosen]
    files = [
        export_task(task, prompt, folder, rows=rows, seed=seed)
        for task, prompt in zip(chosen, prompts, strict=True)
    ]
    if as_json:
        print_json([{"task": f.stem, "path": str(f), "rows": rows} for f in files])
        return
    for file in files:
        out.print(f"{file}: {rows} rows.", highlight=False, soft_wrap=True)
    listed = ",".join(f.stem for f in files)
    out.print(
        f"run them: lm-eval run --include_path {folder} --tasks {listed} --model hf ..., or "
        f"orthomerge eval ADAPTER --harness {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
