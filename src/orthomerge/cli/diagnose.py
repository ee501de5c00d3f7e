"""`orthomerge diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json


@app.command()
def diagnose(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapter folders, in order.")],
    stats: Annotated[
        list[Path], typer.Option(help="Statistics of each adapter's task, in that order; repeat.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """How much each adapter would disturb each task in a merge, before merging anything.

    A figure is the output an adapter adds on a task's inputs, relative to what the task's own
    adapter adds there: 0 is silent, 1 as loud as the task itself.

    Example: [bold]orthomerge diagnose a/ b/ --stats a.stats.safetensors
    --stats b.stats.safetensors[/]
    """
    from rich.table import Table

    from orthomerge.diagnostics import interference

    found = interference(list(adapters), list(stats))
    if json:
        print_json(
            {
                "adapters": found.names,
                "interference": found.matrix.tolist(),
                "layers": {name: m.tolist() for name, m in found.layers.items()},
            }
        )
        return
    table = Table(title="interference: adapter (row) on task (column)")
    table.add_column("")
    for name in found.names:
        table.add_column(name, justify="right")
    for name, row in zip(found.names, found.matrix.tolist(), strict=True):
        table.add_row(name, *(f"{value:.2f}" for value in row))
    out.print(table)
