"""`orthomerge verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, out, print_json, table
from orthomerge.cli._options import Count, Json
from orthomerge.errors import AdapterError

if TYPE_CHECKING:
    from orthomerge.adapters import Behaviour
    from orthomerge.records import Check


@app.command()
def verify(
    output: Path,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    adapter: list[str] | None = None,
    redo: Annotated[bool, typer.Option("--redo")] = False,
    against: list[str] | None = None,
    data: list[str] | None = None,
    text_column: str = "text",
    samples: Count = 100,
    max_length: Count = 128,
    tolerance: float | None = None,
    base: str | None = None,
    json: Json = False,
) -> None:
    """Is an output what was written, from what it says it is from? Exit status 1 if it is not.

    Example: [bold]orthomerge verify merged/ --adapter a/ --adapter b/ --redo[/]

    Does it behave as it must? [bold]orthomerge verify merged/ --against a/ b/ --data texts.jsonl[/]

    Args:
        output: A folder of 'merge', 'convert' or 'init', or a file of 'stats' or 'fisher'.
        adapter: Where an input adapter is now; one for each, in the order they were merged in.
        redo: Merge or convert again; compare the files bit for bit.
        against: With --data: the adapters that were merged, in order; default the record's.
        data: Texts (JSONL, CSV, Parquet or a data set): compare the outputs on them, loaded in a
            fresh process, with the base's under the updates that the record says. One for all
            tasks, or one for each adapter.
        text_column: With --data: the column of the texts.
        samples: With --data: texts of each file.
        max_length: With --data: tokens of a text.
        tolerance: With --data: how far outputs may be from what they must be, in parts of what the
            merge changes; default 0.02, or 0.1 for weights in 16 bits.
        base: The base model, if it is elsewhere now.
        json: Machine-readable output.
    """
    from orthomerge import adapters
    from orthomerge.io.names import RECORDS

    named = [*(against or adapter or ()), *(more or ())]
    if (against or more) and (not data or adapter or (more and len(against or ()) != 1)):
        raise AdapterError(
            "--against names the adapters to compare with, on the texts of --data: write "
            "'--against a/ b/ --data texts.jsonl', without --adapter."
        )
    recorded = not output.is_dir() or any((output / name).is_file() for name in RECORDS)
    found: list[Check] = []
    if recorded or not data:
        found = adapters.verify(output, adapters=named, redo=redo, base=base)
    seen = None
    if data:
        seen = adapters.verify_outputs(
            output, data, adapters=named, base=base, samples=samples, max_length=max_length,
            text_column=text_column, tolerance=tolerance,
        )  # fmt: skip
    good = all(c.good for c in found) and (seen is None or seen.good)
    if json:
        said: dict[str, Any] = {"path": str(output), "ok": good}
        said["checks"] = [dict(c._asdict()) for c in found]
        if seen is not None:
            tasks = [dict(t._asdict()) for t in seen.tasks]
            said["behaviour"] = {"good": seen.good, "said": seen.said, "tasks": tasks}
        print_json(said)
    else:
        _show_checks(output, found)
        if seen is not None:
            _show_behaviour(output, seen)
    if not good:
        raise typer.Exit(1)


def _show_checks(output: Path, found: list[Check]) -> None:
    from rich.markup import escape

    width = max((len(c.state) for c in found), default=0)
    for c in found:
        colour = "green" if c.state == "same" else "yellow" if c.good else "bold red"
        note = f"  ({c.note})" if c.note else ""
        out.print(
            f"[{colour}]{c.state:<{width}}[/]  {c.what:<5}  {escape(c.name + note)}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    if found:
        wrong = sum(not c.good for c in found)
        away = sum(c.state == "not here" for c in found)
        absent = f"; {away} of the inputs are not here" if away else ""
        said = f"{wrong} of {len(found)} differ" if wrong else "all is as it was written"
        out.print(f"{escape(str(output))}: {said}{absent}.", soft_wrap=True, highlight=False)


def _show_behaviour(output: Path, seen: Behaviour) -> None:
    from rich.markup import escape

    if seen.tasks:
        shown = table(
            "task", "differs", "changes", "agrees", "base agrees", "cosine",
            caption="differs: from what the record says, in parts of what the merge changes; "
            "agrees: same largest logit as the task's own adapter; cosine: of the two changes",
        )  # fmt: skip
        for t in seen.tasks:
            shares = [_share(x) for x in (t.difference, t.change, t.agreement, t.base_agreement)]
            shown.add_row(escape(t.task), *shares, "" if t.cosine is None else f"{t.cosine:.2f}")
        out.print(shown)
    colour = "green" if seen.good else "bold red"
    text = f"[{colour}]{escape(str(output))}:[/] {escape(seen.said)}."
    out.print(text, soft_wrap=True, highlight=False)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
