"""`orthomerge report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import Json, Port


@app.command()
def report(
    folders: list[Path],
    json: Json = False,
    markdown: bool = False,
    by_method: Annotated[bool, typer.Option("--by-method")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
    serve: Annotated[bool, typer.Option("--serve")] = False,
    port: Port = 8765,
) -> None:
    """Build a run's page from its result rows alone, compare runs, or follow them (--serve).

    Examples: [bold]orthomerge report runs/demo[/]

    [bold]orthomerge report runs/before runs/after[/]

    [bold]orthomerge report results/which-method --by-method --markdown[/]

    [bold]orthomerge report runs/ --serve[/]

    Args:
        folders: Folder of a run, with its results.jsonl; several are compared on one page.
        markdown: Print the table as Markdown.
        by_method: Print merging methods against arms, untuned and at the best weight; no page.
        output: The page of a comparison; default compare-A-B.html beside the first folder.
        serve: Serve a local page that lists and follows all runs of the folder.
        port: With --serve: the port on this machine.
    """
    from orthomerge.errors import RecipeError

    if serve:
        if len(folders) > 1 or by_method or markdown or output:
            raise RecipeError("--serve shows the runs of one folder: leave the other options out.")
        serve_runs(folders[0], port)
        return
    if len(folders) > 1:
        if by_method or markdown:
            raise RecipeError("--by-method and --markdown are for one run: name one folder.")
        _compare(folders, output, json=json)
        return
    folder = folders[0]
    if output:
        raise RecipeError("--output is for a comparison: the page of one run is in its folder.")
    if by_method:
        _methods(folder, json=json, markdown=markdown)
        return
    from orthomerge.report import (
        build_report,
        known_markdown,
        known_table,
        known_text,
        markdown_table,
        read_source,
        summary_table,
    )

    page = build_report(folder)
    source = read_source(folder)
    rows, beside = source.rows, known_table(source)
    if json:
        print_json({"report": str(page), "rows": len(rows)})
    elif markdown:
        parts = [markdown_table(rows), *([known_markdown(beside)] if beside else [])]
        out.print("\n".join(parts), soft_wrap=True, highlight=False, markup=False)
    else:
        out.print(summary_table(rows, source.arm_tasks))
        if beside:
            out.print(known_text(beside))
        out.print(f"page: {page.resolve()}", soft_wrap=True)


def _compare(folders: list[Path], output: Path | None, *, json: bool) -> None:
    """One page of several runs."""
    from orthomerge.report import build_comparison

    page = build_comparison(folders, output)
    if json:
        print_json({"report": str(page), "runs": [str(f) for f in folders]})
    else:
        out.print(f"page: {page.resolve()}", soft_wrap=True)


def _methods(folder: Path, *, json: bool, markdown: bool) -> None:
    """The merging methods of a run against its arms."""
    from orthomerge.io.rows import read_rows
    from orthomerge.merging import list_methods
    from orthomerge.report import markdown_methods, method_table, methods_json, methods_text

    rows = read_rows(folder / "results.jsonl")
    table = method_table(rows, per_task=[m.name for m in list_methods() if m.per_task])
    if json:
        print_json(methods_json(table))
    elif markdown:
        out.print(markdown_methods(table), soft_wrap=True, highlight=False, markup=False, end="")
    else:
        for part in methods_text(table):
            out.print(part)


def serve_runs(folder: Path, port: int) -> None:
    """Serve the page that follows all runs of a folder, until it is stopped."""
    from orthomerge.board import serve

    def ready(address: str) -> None:
        out.print(f"board: {address}  (Ctrl-C ends it)", soft_wrap=True)

    serve(folder, port, ready)
