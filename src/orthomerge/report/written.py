"""The tables of scores as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from orthomerge.io.rows import ResultRow
from orthomerge.report.aggregate import summarize
from orthomerge.report.summary import ArmSummary, Column, Summary


def csv_table(summary: Summary) -> str:
    """The headline table in long form: a line for each arm and merge, at full precision."""
    about = ["start", "granularity", "constraint", "learning_rate"]
    results = ["mean", "spread", "retained", "seeds"]
    lines: list[list[Any]] = [["arm", *about, "method", "weight", "options", *results]]
    for arm, column in product(summary.arms, summary.columns):
        cell = summary.cell(arm, column)
        if score := cell.score:
            known = [arm.name, *(getattr(arm, name) for name in about)]
            known += [column.method, column.weight, column.options]
            lines.append([*known, score.mean, score.spread, cell.retained, len(score.seeds)])
    return _csv(lines)


def csv_tasks(summary: Summary) -> str:
    """Each task's scores in long form: a line for each arm, merge and task."""
    results = ["mean", "spread", "seeds", "constant_answer"]
    lines: list[list[Any]] = [["arm", "method", "weight", "options", "task", "metric", *results]]
    for (arm, column, task), score in summary.per_task.items():
        known = [arm, column.method, column.weight, column.options, task]
        known += [summary.metrics.get(task), score.mean, score.spread, len(score.seeds)]
        lines.append([*known, summary.majority.get(task)])
    return _csv(lines)


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def markdown_text(text: str) -> str:
    """A text as it stands in a cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def markdown_grid(cells: Sequence[Sequence[str]], names: int = 1) -> str:
    """A header and lines as a Markdown table, all but the first `names` columns to the right."""
    header, *lines = [f"| {' | '.join(map(markdown_text, line))} |" for line in cells]
    rule = "| --- " * names + "| ---: " * (len(cells[0]) - names) + "|"
    return "\n".join([header, rule, *lines])


def markdown_table(rows: Iterable[ResultRow]) -> str:
    """The headline table as Markdown: mean × 100 ± spread over seeds, each column's best bold."""
    summary = summarize(rows)
    best = {c: summary.best(c) for c in summary.columns}

    def shown(arm: ArmSummary, column: Column) -> str:
        score = summary.cell(arm, column).score
        if score is None:
            return "–"
        return f"**{score}**" if arm.name in best[column] else str(score)

    cells = [["arm", *(c.label for c in summary.columns)]]
    cells += [[arm.name, *(shown(arm, c) for c in summary.columns)] for arm in summary.arms]
    return markdown_grid(cells) + "\n"
