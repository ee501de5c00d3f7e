"""`orthomerge board`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out


@app.command(hidden=True)
def board(
    folder: Annotated[Path, typer.Argument(help="The folder that your runs lie in.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port on this machine.")] = 8765,
) -> None:
    """The same as 'orthomerge report FOLDER --serve'."""
    serve_runs(folder, port)


def serve_runs(folder: Path, port: int) -> None:
    """Serve the page that follows all runs of a folder, until it is stopped."""
    from orthomerge.board import serve

    def ready(address: str) -> None:
        out.print(f"board: {address}  (Ctrl-C ends it)", soft_wrap=True)

    serve(folder, port, ready)
