"""`orthomerge diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orthomerge.cli._app import app, out, parse_options, print_json, table
from orthomerge.cli._checks import check_inputs
from orthomerge.cli._options import Json
from orthomerge.cli._progress import Quiet, work_bar

if TYPE_CHECKING:
    from rich.table import Table

    from orthomerge.diagnostics import Diagnosis

LAYERS, PAIRS = 5, 10


@app.command()
def diagnose(
    adapters: list[str],
    stats: list[Path] | None = None,
    method: list[str] | None = None,
    option: list[str] | None = None,
    base: str | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Will these adapters work together? Find out before merging.

    From the adapters alone: how far they overlap, contradict each other, differ in size, and
    whether they began from one start. With statistics of their tasks also what each adapter does
    on every other task's inputs, what a merge will do to every task's outputs, and what to change.

    Example: [bold]orthomerge diagnose a/ b/ --stats a.stats.safetensors
    --stats b.stats.safetensors[/]

    Args:
        adapters: PEFT adapter folders or hub ids.
        stats: Statistics of each adapter's task, in that order; repeat.
        method: Compare this method with the plain sum; repeat. Default: two quick ones.
        option: Of the methods, as key=value; repeat.
        base: Base model of adapters that do not name theirs, or one that lies elsewhere.
    """
    check_inputs(adapters, stats)
    from orthomerge.diagnostics import METHODS
    from orthomerge.diagnostics import diagnose as examine
    from orthomerge.errors import MergeError

    if (method or option) and not stats:
        raise MergeError("a method is judged by the tasks' statistics: name them with --stats.")
    with work_bar("trial merges") as progress:
        found = examine(
            adapters, stats or None, methods=method or METHODS,
            options=parse_options(option or []), base=base, progress=progress,
        )  # fmt: skip
    if json:
        print_json(found.record())
        return
    _say(found)


def _say(found: Diagnosis) -> None:
    out.print(_pairs(found))
    out.print(_adapters(found))
    if found.plain is not None:
        out.print(_interference(found))
        out.print(_shifts(found))
        out.print(_largest(found))
    for line in found.notes:
        out.print(f"[yellow]note[/] {line}", highlight=False)
    for advice in found.advice:
        out.print(f"[green]advice[/] {advice.text}", highlight=False)
    _close(found)


def _close(found: Diagnosis) -> None:
    from orthomerge.diagnostics import evidence

    if found.plain is None:
        out.print(
            "With --stats (one file a task, 'orthomerge stats') this also predicts what a merge "
            "does to every task.",
            style="dim", highlight=False,
        )  # fmt: skip
    else:
        out.print(f"Predicted shift: {evidence('merges')}.", style="dim", highlight=False)


def _pairs(found: Diagnosis) -> Table:
    o = found.overlap
    count = len(o.names)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    # The pairs that contradict each other most come first, where not all are shown.
    shown = sorted(pairs, key=lambda p: -float(o.sign_conflict[p]))[:PAIRS]
    more = (
        f"; {len(shown)} of {len(pairs)} pairs, all with --json" if len(shown) < len(pairs) else ""
    )
    shown_pairs = table(
        "pair", "cosine", "rows of A", "columns of B", "sign conflict",
        title="pairs, from the adapters alone",
        caption=f"spaces shared: 1 all, 0 none; signs: 0.5 is chance, less is agreement{more}",
    )  # fmt: skip
    for i, j in shown:
        figures = (o.cosine, o.row_space, o.column_space, o.sign_conflict)
        shown_pairs.add_row(f"{o.names[i]}, {o.names[j]}", *(f"{f[i, j]:.2f}" for f in figures))
    return shown_pairs


def _adapters(found: Diagnosis) -> Table:
    o = found.overlap
    sizes = table("adapter", "norm", "effective rank", title="adapters")
    for name, norm, rank in zip(o.names, o.norms, o.effective_rank, strict=True):
        sizes.add_row(name, f"{norm:.3g}", f"{rank:.1f}")
    return sizes


def _interference(found: Diagnosis) -> Table:
    assert found.interference is not None
    names = found.interference.names
    matrix = table(
        "", *names, title="interference: adapter (row) on task (column)",
        caption="0 is no disturbance, 1 as much as the task's own adapter",
    )  # fmt: skip
    for name, row in zip(names, found.interference.matrix, strict=True):
        matrix.add_row(name, *(f"{value:.2f}" for value in row))
    return matrix


def _shifts(found: Diagnosis) -> Table:
    assert found.plain is not None
    names = found.overlap.names
    shifts = table(
        "merge", "weight", *names, "mean", title="predicted shift of every task's outputs",
        caption="0 is as alone; 1 is all of the own adapter lost",
    )  # fmt: skip
    plain = found.plain
    merges = [("sum", 1.0, plain.untuned)]
    if round(plain.weight, 2) != 1:
        merges.append(("sum", plain.weight, plain.shift))
    merges += [(name, best.weight, best.shift) for name, best in found.methods.items()]
    for name, weight, shift in merges:
        values = (f"{v:.2f}" for v in (weight, *shift.total, shift.mean))
        shifts.add_row(name, *values)
    return shifts


def _largest(found: Diagnosis) -> Table:
    shown = found.largest_shifts[:LAYERS]
    whole = sum(value for _, value in found.largest_shifts) or 1.0
    layers = table("layer", "share of the shift", title="layers that hurt the plain sum most")
    for name, value in shown:
        layers.add_row(name, f"{100 * value / whole:.0f} %")
    return layers
