"""`orthomerge methods`."""

from __future__ import annotations

from typing import Any

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._options import Json


@app.command()
def methods(
    json: Json = False,
) -> None:
    """The merging methods with their options and the paper each comes from."""
    from rich.box import SIMPLE
    from rich.table import Table

    from orthomerge.merging import list_methods

    found = list_methods()
    if json:
        print_json(
            [
                {"name": m.name, "aliases": list(m.aliases), "title": m.title,
                 "summary": m.summary, "paper": m.paper, "url": m.url,
                 "options": dict(m.options), "low_rank": m.low_rank, "needs": list(m.needs),
                 "per_task": m.per_task}
                for m in found
            ]
        )  # fmt: skip
        return
    table = Table(title="merging methods", box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("when to use it, and its options", ratio=1)
    table.add_column("paper", max_width=24)
    for m in found:
        table.add_row(f"[bold]{m.name}[/]", _about(m), m.paper)
    out.print(table)


def _about(method: Any) -> str:
    """Summary, options and what the method needs, under each other."""
    from rich.markup import escape

    lines = [escape(method.summary)]
    if method.aliases:
        lines.append(f"[dim]the same under other names: {', '.join(method.aliases)}[/]")
    if method.options:
        options = (f"{k.rstrip('_')}={v}" for k, v in method.options.items())
        lines.append(f"[cyan]{escape('  '.join(options))}[/]")
    given = {
        "moments": "each task's statistics (--stats)",
        "fisher": "each adapter's Fisher information (--fisher)",
    }
    needs = [given[what] for what in method.needs]
    if needs:
        lines.append(f"[yellow]needs {' and '.join(needs)}[/]")
    if method.per_task:
        lines.append("[yellow]leaves an adapter a task as well[/]")
    return "\n".join(lines)
