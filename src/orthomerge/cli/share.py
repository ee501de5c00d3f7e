"""`orthomerge share`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthomerge.cli._app import app, out, print_json, table
from orthomerge.cli._options import CountOrNone, Json, Output, Overwrite
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.errors import MergeError

if TYPE_CHECKING:
    from orthomerge.adapters import SharedAdapters


@app.command()
def share(
    adapters: list[str],
    output: Output,
    rank: CountOrNone = None,
    side: str = "both",
    compact: Annotated[bool, typer.Option("--compact")] = False,
    expand: Annotated[bool, typer.Option("--expand")] = False,
    base: str | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put many adapters into one basis per layer, with coordinates per task.

    Every task keeps an adapter of its own: a PEFT folder under tasks/, all with the same A.

    Example: [bold]orthomerge share a/ b/ c/ --rank 32 --output shared/[/]

    Args:
        adapters: PEFT adapter folders or hub ids; with --expand the folder of a --compact one.
        output: The folder to write.
        rank: Rows of the basis, and the rank of every task's adapter.
        side: 'both': A and the columns of B are shared; 'right': A alone, which loses less.
        compact: Write the basis once and each task's coordinates; --expand makes folders of them.
        expand: Make the PEFT folders of what --compact wrote.
        base: The base model, for DoRA and where adapters call it by several names.
    """
    from orthomerge.adapters import expand_shared, share_adapters

    if expand:
        if len(adapters) != 1 or rank is not None or compact:
            raise MergeError("--expand takes one folder that --compact wrote, and no rank.")
        made = expand_shared(adapters[0], output, overwrite=overwrite)
        if json:
            print_json([str(path) for path in made])
        else:
            out.print(f"{output}: {len(made)} adapters.", soft_wrap=True)
        return
    if rank is None:
        raise MergeError("say the rank of the basis with --rank, as --rank 32.")
    with work_bar("layers") as progress:
        found = share_adapters(
            adapters, output, rank, side=side, compact=compact, base=base, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    if json:
        print_json({"path": str(output), "total": found.total, "errors": found.errors,
                    "before": found.before, "after": found.after})  # fmt: skip
        return
    _print(found)
    size = sum(p.stat().st_size for p in Path(output).rglob("*.safetensors"))
    out.print(
        f"{output}: {len(found.tasks)} adapters of rank {rank}, {size / 1e6:.1f} MB. Their factors "
        f"had {found.before:,} values; basis and coordinates have {found.after:,}.",
        soft_wrap=True,
    )


def _print(found: SharedAdapters) -> None:
    """What each task lost, in all and where most."""
    shown = table("adapter", "error", "largest", "layer", caption="share.json has every layer.")
    for task in found.tasks:
        errors = found.errors.get(task, {})
        worst = max(errors, key=errors.__getitem__, default="")
        largest = f"{errors[worst]:.2%}" if worst else ""
        shown.add_row(task, f"{found.total[task]:.2%}", largest, worst)
    out.print(shown)
