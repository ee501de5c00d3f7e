"""`orthomerge board`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out


@app.command()
def board(
    folder: Annotated[Path, typer.Argument(help="The folder that your runs lie in.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port on this machine.")] = 8765,
) -> None:
    """List all runs on a local page: follow them, open their reports, compare them.

    Read-only, and for this machine alone. Example: [bold]orthomerge board runs/ --port 8765[/]
    """
    from orthomerge.board import serve

    def ready(address: str) -> None:
        out.print(f"board: {address}  (Ctrl-C ends it)", soft_wrap=True)

    serve(folder, port, ready)
