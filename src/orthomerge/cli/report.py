"""`orthomerge report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import Json
from orthomerge.cli.board import serve_runs


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a run, with its results.jsonl; several are set side by side."
        ),
    ],
    json: Json = False,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    by_method: Annotated[
        bool,
        typer.Option(
            "--by-method",
            help="Print merging methods against arms, untuned and at the best weight; no page.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page of a comparison; default compare-A-B.html beside the first folder.",
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Serve a local page that lists and follows all runs of the folder."
        ),
    ] = False,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="With --serve: the port on this machine.")
    ] = 8765,
) -> None:
    """Build a run's page from its result rows alone, compare runs, or follow them (--serve).

    Examples: [bold]orthomerge report runs/demo[/]

    [bold]orthomerge report runs/before runs/after[/]

    [bold]orthomerge report results/which-method --by-method --markdown[/]

    [bold]orthomerge report runs/ --serve[/]
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
        raise RecipeError("--output is for a comparison: the page of one run lies in its folder.")
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
