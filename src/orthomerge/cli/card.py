"""`orthomerge card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import Json


@app.command(hidden=True)
def card(
    folder: Annotated[Path, typer.Argument(help="A folder that 'orthomerge merge' wrote.")],
    results: Annotated[
        list[Path],
        typer.Option(help="What 'orthomerge eval --json' printed, in a file; repeat."),
    ],
    json: Json = False,
) -> None:
    """Write scores into a merge's model card, for its readers: what to expect of each task.

    Figures of a task that the card has already are replaced. 'orthomerge eval --card' does both at
    once.

    Example: [bold]orthomerge card model/ --results sentiment.json --results topic.json[/]
    """
    from orthomerge.records import add_scores, read_scores

    told = add_scores(folder, read_scores(results))
    if json:
        print_json({"path": str(folder), "figures": [figure.model_dump() for figure in told]})
        return
    tasks = ", ".join(figure.task for figure in told)
    out.print(f"{folder / 'README.md'}: figures of {tasks}.", soft_wrap=True, highlight=False)
