"""`orthomerge plan`: the old name of `orthomerge run --dry-run`, for one release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app
from orthomerge.cli._options import Json


@app.command(hidden=True)
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or one that comes along.")],
    gpus: Annotated[int, typer.Option(min=1, help="Now: --jobs.")] = 1,
    throughput: Annotated[Path | None, typer.Option(help="Now: --speed FILE.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Now: --speed measure.")] = False,
    card: Annotated[str, typer.Option(help="Now: --speed CARD.")] = "h100",
    json: Json = False,
) -> None:
    """Use `orthomerge run RECIPE --dry-run --speed h100 --jobs 8` instead: it says the same."""
    from orthomerge.cli.run import dry
    from orthomerge.errors import RecipeError

    if measure and throughput:
        raise RecipeError("--measure and --throughput say the same thing twice: give one of them.")
    speed = "measure" if measure else str(throughput) if throughput else card
    dry(recipe, None, {}, speed=speed, jobs=gpus, json=json)
