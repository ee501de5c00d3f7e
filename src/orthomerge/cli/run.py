"""`orthomerge run` and `orthomerge demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/<name>.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result rows as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or one that comes along.")],
    output: Output = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: statistics, starts, training, merging, scores and a page.

    Called again it goes on where it was stopped.

    Example: [bold]orthomerge run recipes/demo.yaml --output runs/demo[/]
    """
    _run(recipe, output, json=json, quiet=quiet)


@app.command()
def demo(output: Output = None, json: AsJson = False, quiet: Quiet = False) -> None:
    """Four real tasks, three starts, one merged adapter each: the main job in a few minutes."""
    _run("demo.yaml", output, json=json, quiet=quiet)


def _run(source: str, output: Path | None, *, json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from orthomerge.cli._app import err
    from orthomerge.cli._progress import RunProgress
    from orthomerge.experiment import Run, load_recipe
    from orthomerge.report import build_report, summary_table

    recipe, text = load_recipe(source)
    folder = output or Path("runs") / recipe.name
    command = "orthomerge " + " ".join(sys.argv[1:])
    with RunProgress(err if json else out, quiet=quiet) as progress:
        job = Run(recipe, folder, text=text, command=command, reporter=progress)
        rows = job.execute()
    page = build_report(folder)
    if json:
        print_json({"rows": [asdict(r) for r in rows], "report": str(page)})
        return
    out.print(summary_table(rows))
    out.print(f"\nrows:  {folder / 'results.jsonl'}\npage:  {page.resolve()}", soft_wrap=True)
