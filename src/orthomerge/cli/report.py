"""`orthomerge report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, with its results.jsonl.")],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """Rebuild a run's page from its result rows alone.

    Example: [bold]orthomerge report runs/demo[/]
    """
    from orthomerge.report import build_report, markdown_table, summary_table
    from orthomerge.rows import read_rows

    page = build_report(folder)
    rows = read_rows(folder / "results.jsonl")
    if json:
        print_json({"report": str(page), "rows": len(rows)})
    elif markdown:
        out.print(markdown_table(rows), soft_wrap=True, highlight=False, markup=False)
    else:
        out.print(summary_table(rows))
        out.print(f"page: {page.resolve()}", soft_wrap=True)
