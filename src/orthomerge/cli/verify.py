"""`orthomerge verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json


@app.command()
def verify(
    output: Path,
    adapter: list[str] | None = None,
    redo: Annotated[bool, typer.Option("--redo")] = False,
    base: str | None = None,
    json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Is an output what was written, from what it says it is from? Exit status 1 if it is not.

    Example: [bold]orthomerge verify merged/ --adapter a/ --adapter b/ --redo[/]

    Args:
        output: A folder of 'merge', 'convert' or 'init', or a file of 'stats' or 'fisher'.
        adapter: Where an input adapter is now; one for each, in the order they were merged in.
        redo: Merge or convert again; compare the files bit for bit.
        base: The base model, if it is elsewhere now.
        json: Machine-readable output.
    """
    from rich.markup import escape

    from orthomerge.adapters import verify as check

    found = check(output, adapters=adapter or (), redo=redo, base=base)
    wrong = [c for c in found if not c.good]
    if json:
        print_json(
            {"path": str(output), "ok": not wrong, "checks": [dict(c._asdict()) for c in found]}
        )
    else:
        width = max(len(c.state) for c in found)
        for c in found:
            colour = "green" if c.state == "same" else "yellow" if c.good else "bold red"
            note = f"  ({c.note})" if c.note else ""
            out.print(
                f"[{colour}]{c.state:<{width}}[/]  {c.what:<5}  {escape(c.name + note)}",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
        away = sum(c.state == "not here" for c in found)
        inputs = f"; {away} of the inputs are not here" if away else ""
        said = f"{len(wrong)} of {len(found)} differ" if wrong else "all is as it was written"
        out.print(f"{escape(str(output))}: {said}{inputs}.", soft_wrap=True, highlight=False)
    if wrong:
        raise typer.Exit(1)
