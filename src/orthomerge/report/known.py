"""A run's scores in a paper's layout, beside the figures known from elsewhere, marked as such.

A line an arm, methods below each other, a column a task, the average last.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from orthomerge.io.documents import is_object
from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.report.aggregate import summarize
from orthomerge.report.source import Source
from orthomerge.report.summary import Column, Summary, percent
from orthomerge.report.written import markdown_grid

_SHORT = {
    "matthews": "MCC",
    "accuracy": "acc",
    "f1": "F1/acc",
    "pearson_spearman": "P+S/2",
}


@dataclass(frozen=True)
class Line:
    """One line: an arm's scores under one method, or a known figure with its mark."""

    label: str
    cells: list[str]
    known: bool = False


@dataclass(frozen=True)
class KnownTable:
    """Headers, groups of lines by method, and what to say below."""

    headers: list[str]
    groups: list[tuple[str, list[Line]]]
    notes: list[str]


def known_table(source: Source) -> KnownTable | None:
    """The table of a run whose record carries known figures, None for one that carries none."""
    figures: list[Any] = source.run.get("known") or []
    known = [k for k in figures if is_object(k)]
    if not known:
        return None
    given, own = source.rows, source.arm_tasks
    titles = {name: str(t["title"]).split(" (")[0] for name, t in source.about.items()}
    ours = summarize(given, list(titles), own)
    # F1 is what GLUE ranks MRPC and QQP by beside accuracy, which the paper's code selects by.
    plain = summarize(map(_by_accuracy, given), list(titles), own)
    headers = [f"{titles.get(t, t)}\n{_SHORT.get(ours.metrics[t], '')}" for t in ours.tasks]
    groups: list[tuple[str, list[Line]]] = []
    placed: set[str] = set()
    for place, column in enumerate(ours.columns):
        lines = [
            Line(arm.name, _scores(arm.name, column, ours, plain))
            for arm in ours.arms
            if any((arm.name, column, t) in ours.per_task for t in ours.tasks)
        ]
        if column.method not in (c.method for c in ours.columns[place + 1 :]):
            lines += [_known(k, ours.tasks) for k in known if k["method"] == column.method]
            placed.add(column.method)
        groups.append(("own adapters" if column.method == SINGLE else column.label, lines))
    rest = [k for k in known if k["method"] not in placed]
    groups += [(str(k["method"]), [_known(k, ours.tasks)]) for k in rest]
    notes = [
        "F1/acc: F1 above, accuracy below; the average counts F1, the one below it accuracy.",
        *(f"* {k['label']}: {k['note']}; {k['source']}" for k in known),
        *ours.notices,
    ]
    return KnownTable(["", *headers, "average"], groups, notes)


def _by_accuracy(row: ResultRow) -> ResultRow:
    if row.metric != "f1" or "accuracy" not in row.metrics:
        return row
    return replace(row, value=row.metrics["accuracy"])


def _scores(arm: str, column: Column, ours: Summary, plain: Summary) -> list[str]:
    cells = []
    for task in ours.tasks:
        score = ours.per_task.get((arm, column, task))
        text = percent(score.mean) if score else "–"
        if score and ours.metrics[task] == "f1":
            text += f"\n{percent(plain.per_task[arm, column, task].mean)}"
        cells.append(text)
    averages = [_average(arm, column, ours), _average(arm, column, plain)]
    return [*cells, "\n".join(dict.fromkeys(averages))]


def _average(arm: str, column: Column, summary: Summary) -> str:
    found = [summary.per_task.get((arm, column, t)) for t in summary.tasks]
    whole = [score.mean for score in found if score is not None]
    return f"{100 * statistics.fmean(whole):.2f}" if len(whole) == len(found) else "–"


def _known(figure: dict[str, Any], tasks: Sequence[str]) -> Line:
    own: dict[str, float] = figure.get("tasks") or {}
    cells = [f"{own[t]:.1f}" if t in own else "·" for t in tasks]
    average = figure.get("average")
    return Line(
        f"{figure['label']} *", [*cells, "·" if average is None else f"{average:.2f}"], known=True
    )


def known_text(table: KnownTable) -> Table:
    """The table for a terminal."""
    shown = Table(
        title="In the paper's layout, score × 100; * is known from elsewhere, not measured here",
        caption=Text("\n".join(table.notes), style="dim"),
        box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", padding=(0, 1, 0, 0),
    )  # fmt: skip
    for place, header in enumerate(table.headers):
        shown.add_column(Text(header), justify="right" if place else "left", overflow="fold")
    for method, lines in table.groups:
        shown.add_section()
        shown.add_row(Text(method, style="bold"))
        for line in lines:
            style = "italic cyan" if line.known else ""
            shown.add_row(Text(f"  {line.label}", style=style), *map(Text, line.cells))
    return shown


def known_markdown(table: KnownTable) -> str:
    """The table as Markdown, one line per method and arm."""
    cells = [["method", "arm", *table.headers[1:]]]
    for method, group in table.groups:
        for line in group:
            mark = f"*{line.label.removesuffix(' *')}*" if line.known else line.label
            cells.append([method, mark, *(c.replace("\n", " / ") for c in line.cells)])
    notes = "\n".join(f"- {note.lstrip('* ')}" for note in table.notes)
    return f"{markdown_grid(cells, names=2)}\n\n{notes}\n"
