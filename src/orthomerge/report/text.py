"""The headline table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.report.aggregate import summarize
from orthomerge.report.methods import MethodTable
from orthomerge.report.methods_written import caption, grid
from orthomerge.report.summary import PLAIN, ArmSummary, Column, Summary, percent

# Up to this many arms stand beside each other; more stand below each other, in narrow columns.
ARMS_ABREAST = 5


def summary_table(
    rows: Iterable[ResultRow], arm_tasks: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """Mean score × 100 over tasks for every arm and merge, the best of each merge bold."""
    summary = summarize(rows, (), arm_tasks)
    tasks = len(summary.tasks)
    table = Table(
        title=f"Mean score × 100 over {tasks} task{'' if tasks == 1 else 's'}",
        caption=_caption(summary),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    if len(summary.arms) <= ARMS_ABREAST:
        _arms_abreast(table, summary)
    else:
        _arms_below(table, summary)
    return table


def _arms_abreast(table: Table, summary: Summary) -> None:
    """A line a merge, a column an arm."""
    best = {c: summary.best(c) for c in summary.columns}
    table.add_column("merge", no_wrap=False, overflow="fold")
    for arm in summary.arms:
        table.add_column(Text(arm.name), justify="right", overflow="fold")
    group = None
    for column in summary.columns:
        kind = column.method if column.method in (SINGLE, PLAIN) else "other"
        if group not in (None, kind):
            table.add_section()
        group = kind
        cells = [_score(summary, a, column, best[column], " ") for a in summary.arms]
        table.add_row(Text(column.label), *cells)


def _arms_below(table: Table, summary: Summary) -> None:
    """A line an arm, a narrow column a merge."""
    best = {c: summary.best(c) for c in summary.columns}
    table.padding = (0, 1, 0, 0)
    table.add_column("arm", overflow="fold", min_width=12)
    for column in summary.columns:
        name = re.sub(r"_(?=.)|, | (?=[×(])", lambda sign: f"{sign[0].strip()}\n", column.label)
        table.add_column(Text(name), justify="right", overflow="fold", min_width=5, max_width=7)
    for arm in summary.arms:
        cells = [_score(summary, arm, c, best[c], "\n") for c in summary.columns]
        table.add_row(Text(arm.name), *cells)


def _score(summary: Summary, arm: ArmSummary, column: Column, best: set[str], between: str) -> Text:
    """A cell: the mean, and the spread after `between`."""
    score = summary.cell(arm, column).score
    if score is None:
        return Text("–", style="dim")
    text = Text(percent(score.mean), style="bold green" if arm.name in best else "")
    if score.spread is not None:
        text.append(f"{between}±{percent(score.spread)}", style="dim")
    return text


def _caption(summary: Summary) -> Text:
    seeds = summary.seeds
    text = "± is the standard deviation over seeds." if seeds > 1 else "One seed: no spread."
    if summary.floor is not None:
        text += f" A constant answer scores {percent(summary.floor)}."
    if summary.notices:
        text += f" {summary.notices[0]}"
        if len(summary.notices) > 1:
            text += f" (and {len(summary.notices) - 1} more notices on the page)"
    return Text(text if seeds else "Nothing is scored on every task yet.", style="dim")


def methods_text(table: MethodTable) -> Iterator[Table | Text]:
    """Merging methods, a table an arm, and what is left out of them."""
    yield Text(caption(table))
    for per_task in (False, True):
        for arm in table.arms:
            cells = grid(table, per_task=per_task, arms=[arm])
            if not cells:
                continue
            title = f"{arm}, one update per task" if per_task else arm
            shown = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left")
            shown.add_column("method", overflow="fold")
            for header in cells[0][1:]:
                shown.add_column(Text(header.removeprefix(f"{arm}, ")), justify="right")
            for line in cells[1:]:
                shown.add_row(*map(Text, line))
            yield shown
    for notice in table.notices:
        yield Text(notice, style="dim")
