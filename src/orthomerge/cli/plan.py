"""`orthomerge plan`: what a recipe takes, before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from orthomerge.cli._app import app, print_json
from orthomerge.cli._options import Json
from orthomerge.io.units import human_size


@app.command(hidden=True)
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or one that comes along.")],
    gpus: Annotated[int, typer.Option(min=1, help="Workers side by side, one GPU each.")] = 1,
    throughput: Annotated[
        Path | None,
        typer.Option(help="run.json of an earlier run, or a JSON file of rates: how fast it goes."),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine first.")] = False,
    card: Annotated[
        str, typer.Option(help="Else an estimate for h100, a100, l40s or rtx4090.")
    ] = "h100",
    json: Json = False,
) -> None:
    """Jobs, hours, disk, memory and wall time of a recipe; nothing is downloaded or run.

    Example: [bold]orthomerge plan plan-8b.yaml --gpus 8[/]
    """
    from orthomerge.errors import RecipeError
    from orthomerge.experiment import load_recipe
    from orthomerge.experiment.plan import Plan, throughput_of_run
    from orthomerge.experiment.throughput import Throughput, estimated, measured, read_rates

    if measure and throughput:
        raise RecipeError("--measure and --throughput say the same thing twice: give one of them.")
    planned = Plan(load_recipe(recipe)[0])
    if throughput:
        found = read_rates(throughput)
        speed = (
            Throughput(found["rates"], f"the rates in {throughput}")
            if "rates" in found
            else throughput_of_run(found, str(throughput))
        )
    else:
        speed = measured() if measure else estimated(card)
    estimate = planned.estimate(speed, gpus)
    if json:
        print_json(estimate)
        return
    typer.echo(as_text(estimate))


def as_text(estimate: dict[str, Any]) -> str:
    """The estimate as a person reads it."""
    lines = [
        f"{estimate['recipe']}: {estimate['base']}, {estimate['parameters'] / 1e9:.2f} billion "
        f"parameters (from {estimate['shapes']})",
        f"speed: {estimate['throughput']['source']}",
        "",
        f"{'kind':<8}{'jobs':>6}{'hours':>10}{'disk':>12}{'peak memory':>14}",
    ]
    for kind, entry in estimate["kinds"].items():
        disk, memory = human_size(entry["disk"]), human_size(entry["memory"])
        lines.append(f"{kind:<8}{entry['jobs']:>6}{entry['hours']:>10.3g}{disk:>12}{memory:>14}")
    disk, memory = human_size(estimate["disk"]), human_size(estimate["memory"])
    lines.append(f"{'all':<8}{estimate['jobs']:>6}{estimate['hours']:>10.3g}{disk:>12}{memory:>14}")
    workers = estimate["workers"]
    lines += [
        "",
        f"{estimate['rows']} rows; {estimate['wall_hours']:.3g} hours on {workers} "
        f"worker{'s' if workers > 1 else ''}",
    ]
    return "\n".join(lines)
