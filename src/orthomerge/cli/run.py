"""`orthomerge run` and `orthomerge demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.units import parse_size

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
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or one that comes along.")],
    output: Output = None,
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
    """
    from orthomerge.experiment.executors.choose import choose_executor

    chosen = choose_executor(
        executor, jobs=jobs, memory=parse_size(memory) if memory else None, address=address
    )
    _run(recipe, output, json=json, quiet=quiet, executor=chosen, retries=retries)


@app.command()
def demo(output: Output = None, json: AsJson = False, quiet: Quiet = False) -> None:
    """Four real tasks, three starts, one merged adapter each: the main job in a few minutes."""
    _run("demo.yaml", output, json=json, quiet=quiet)


def _run(
    source: str,
    output: Path | None,
    *,
    json: bool,
    quiet: bool,
    executor: Executor | None = None,
    retries: int = 2,
) -> None:
    from dataclasses import asdict

    from orthomerge.cli._app import err
    from orthomerge.cli._progress import RunProgress
    from orthomerge.experiment import Run, load_recipe
    from orthomerge.report import build_report, summary_table

    recipe, text = load_recipe(source)
    folder = output or Path("runs") / recipe.name
    command = "orthomerge " + " ".join(sys.argv[1:])
    with RunProgress(err if json else out, quiet=quiet) as progress:
        job = Run(
            recipe, folder, text=text, command=command,
            reporter=progress, executor=executor, retries=retries,
        )  # fmt: skip
        rows = job.execute()
    page = build_report(folder)
    if json:
        print_json({"rows": [asdict(r) for r in rows], "report": str(page)})
        return
    out.print(summary_table(rows))
    out.print(f"\nrows:  {folder / 'results.jsonl'}\npage:  {page.resolve()}", soft_wrap=True)
