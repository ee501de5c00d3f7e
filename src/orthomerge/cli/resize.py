"""`orthomerge resize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from orthomerge.cli._app import app, out, print_json, table
from orthomerge.cli._checks import check_inputs, check_output
from orthomerge.cli._options import (
    Energy,
    Json,
    MaxError,
    Output,
    Overwrite,
    kept_energy,
    parse_rank,
)
from orthomerge.cli._progress import Quiet, work_bar

WORST = 5


@app.command()
def resize(
    adapter: str,
    output: Output,
    rank: Annotated[str, typer.Option()] = "auto",
    energy: Energy = None,
    max_error: MaxError = None,
    base: str | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an adapter smaller: the closest one of a lower rank, its head and all else kept.

    Example: [bold]orthomerge resize a/ --rank auto --energy 0.99 --output small/[/]

    Args:
        adapter: A PEFT adapter folder or hub id.
        output: The folder to write.
        rank: A number, or 'auto': in every layer the least that keeps --energy.
        base: The base model, for DoRA.
    """
    check_inputs([adapter])
    check_output(output, [adapter], base, overwrite=overwrite)
    from orthomerge.adapters import resize_adapter

    with work_bar("layers") as progress:
        small = resize_adapter(
            adapter, output, rank=parse_rank(rank) or rank, energy=kept_energy(energy, max_error),
            base=base, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    layers: Any = small.layers
    ranks = {name: factors.rank for name, factors in layers.items()}
    errors = dict(small.truncation_error)
    if json:
        print_json({"path": str(output), "ranks": ranks, "truncation_error": errors})
        return
    show_ranks(ranks, errors)
    size = sum(p.stat().st_size for p in Path(output).glob("*.safetensors"))
    out.print(f"{output}: {len(ranks)} layers, {span(ranks)}, {size / 1e6:.1f} MB.", soft_wrap=True)


def show_ranks(ranks: dict[str, int], errors: dict[str, float], record: str = "merge.json") -> None:
    """The layers that lost most, with the rank that they have now."""
    if not any(errors.values()):
        return
    shown = table("layer", "rank", "error", caption=f"The largest errors; {record} has all.")
    for name in sorted(errors, key=errors.__getitem__, reverse=True)[:WORST]:
        shown.add_row(name, str(ranks[name]), f"{errors[name]:.2%}")
    out.print(shown)


def span(ranks: dict[str, int]) -> str:
    """The ranks of all layers in words."""
    low, high = min(ranks.values()), max(ranks.values())
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
