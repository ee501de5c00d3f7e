"""`orthomerge merge` and `orthomerge methods`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, parse_numbers, parse_options, print_json


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapter folders, in order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    method: Annotated[str, typer.Option(help="A name of 'orthomerge methods'.")] = "linear",
    weights: Annotated[
        str | None, typer.Option(help="One a adapter or one for all, as 1,1,0.5; default 1.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method, key=value; repeat.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result; default what the method gives.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For methods that draw.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Merge LoRA adapters of one base model into one adapter, straight from their factors.

    Example: [bold]orthomerge merge a/ b/ c/ --method ties --option density=0.2 --output merged/[/]
    """
    from orthomerge.adapters import merge_adapters
    from orthomerge.factors import LoraFactors

    numbers = parse_numbers(weights, "weights")
    given = numbers[0] if numbers is not None and len(numbers) == 1 else numbers
    merged = merge_adapters(
        list(adapters),
        method=method,
        weights=given,
        rank=rank,
        seed=seed,
        output=output,
        **parse_options(option or []),
    )
    errors = merged.truncation_error
    worst = max(errors.values(), default=0.0)
    ranks = [
        f.rank if isinstance(f, LoraFactors) else (rank or min(f.shape))
        for f in merged.layers.values()
    ]
    if json:
        print_json(
            {"path": str(output), "method": method, "layers": len(ranks), "rank": max(ranks),
             "truncation_error": errors}
        )  # fmt: skip
        return
    cut = f"; at most {worst:.1%} of a layer was cut by the rank" if worst > 0.0005 else ""
    out.print(
        f"{output}: {len(adapters)} adapters, {len(ranks)} layers, method {method}, rank "
        f"{max(ranks)}{cut}.",
        soft_wrap=True,
    )


@app.command()
def methods(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """The merging methods with their options and the paper each comes from."""
    from rich.table import Table

    from orthomerge.merging import list_methods

    found = list_methods()
    if json:
        print_json(
            [
                {"name": m.name, "title": m.title, "summary": m.summary, "paper": m.paper,
                 "url": m.url, "options": dict(m.options), "low_rank": m.low_rank}
                for m in found
            ]
        )  # fmt: skip
        return
    table = Table(title="merging methods", show_lines=False, expand=False)
    for column in ("method", "when to use it", "options", "paper"):
        table.add_column(column, overflow="fold")
    for m in found:
        options = ", ".join(f"{k.rstrip('_')}={v}" for k, v in m.options.items())
        table.add_row(f"[bold]{m.name}[/]", m.summary, options, m.paper)
    out.print(table)


@app.command()
def tasks(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """The labelled tasks that come along, how they are made and under what licence."""
    from rich.table import Table

    from orthomerge.tasks import list_tasks

    found = list_tasks()
    if json:
        print_json(
            [
                {"name": t.name, "title": t.title, "kind": t.kind, "labels": list(t.labels),
                 "metric": t.metric, "source": t.source, "licence": t.licence, "made": t.made}
                for t in found
            ]
        )  # fmt: skip
        return
    table = Table(title="tasks")
    for column in ("task", "what", "metric", "how it is made", "licence"):
        table.add_column(column, overflow="fold")
    for t in found:
        table.add_row(f"[bold]{t.name}[/]", t.title, t.metric, t.made, t.licence)
    out.print(table)
