"""`orthomerge run` and `orthomerge demo`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, out, parse_options, print_json
from orthomerge.cli._progress import Quiet
from orthomerge.io.units import parse_size

if TYPE_CHECKING:
    from orthomerge.experiment.executors import Executor

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/<name>.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result rows as JSON.")]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, help="local: worker processes side by side.")
]
Memory = Annotated[
    str | None,
    typer.Option(help="local: memory for jobs side by side, as 16GB; default what is free."),
]
Address = Annotated[
    str | None,
    typer.Option(help="ray: the cluster, 'auto' on one of its machines; default this machine."),
]
Retries = Annotated[
    int, typer.Option(min=0, help="Times a job is tried again when its worker died.")
]
Base = Annotated[
    str | None, typer.Option(help="Another base model: a folder, or a name as in the recipe.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="A key of the recipe and its value, as data.train=100; repeat."),
]
Dry = Annotated[bool, typer.Option("--dry-run", help="Check the recipe and say what it would do.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or one that comes along.")],
    output: Output = None,
    base: Base = None,
    change: Changes = None,
    dry: Dry = False,
    executor: Annotated[
        str, typer.Option(help="local (this machine) or ray (a Ray cluster).")
    ] = "local",
    jobs: Jobs = 1,
    memory: Memory = None,
    address: Address = None,
    retries: Retries = 2,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: statistics, starts, training, merging, scores and a page.

    Called again it goes on where it was stopped. Jobs run one after another, side by side
    (--jobs), or on a Ray cluster whose machines share the output folder; see docs/scale.md.

    Example: [bold]orthomerge run recipes/demo.yaml --output runs/demo --jobs 2[/]

    [bold]orthomerge run recipes/paper/roberta-large.yaml --base my-roberta/ --dry-run[/]
    """
    changes = parse_options(change or [], "--set data.train=100") | ({"base": base} if base else {})
    if dry:
        _dry_run(recipe, output, changes, json=json)
        return
    from orthomerge.experiment.executors.choose import choose_executor

    chosen = choose_executor(
        executor, jobs=jobs, memory=parse_size(memory) if memory else None, address=address
    )
    _run(recipe, output, changes, json=json, executor=chosen, retries=retries)


@app.command()
def demo(output: Output = None, json: AsJson = False, quiet: Quiet = False) -> None:
    """Train and merge adapters of four real tasks in a few minutes, and show what merging cost.

    Example: [bold]orthomerge demo --output runs/demo[/]
    """
    _run("demo.yaml", output, {}, json=json)


def _dry_run(source: str, output: Path | None, changes: Mapping[str, Any], *, json: bool) -> None:
    from dataclasses import asdict

    from orthomerge.cli._dry import describe
    from orthomerge.experiment import dry_run, load_recipe

    recipe, _ = load_recipe(source, changes)
    folder = output or Path("runs") / recipe.name
    found = dry_run(recipe, folder)
    if json:
        print_json({"name": recipe.name, "output": str(folder), **asdict(found)})
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
