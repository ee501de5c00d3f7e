"""The table of merging methods as text: cells, Markdown, and JSON in long form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthomerge.report.methods import MethodTable, Outcome
from orthomerge.report.written import markdown_grid


def grid(
    table: MethodTable, *, per_task: bool = False, arms: Sequence[str] | None = None
) -> list[list[str]]:
    """The header and one line per method, as text: score and retained share, each with its spread.

    Of the methods that give one update two columns an arm, of the others one: no weight is chosen.
    """
    lines = table.per_task if per_task else table.shared
    arms = table.arms if arms is None else arms
    kinds = ["as published"] if per_task else ["as published", "best weight"]
    if not lines:
        return []
    cells = [["method", *(f"{arm}, {kind}" for arm in arms for kind in kinds)]]
    alone: list[str] = []
    for arm in arms:
        score = table.singles[arm].score
        alone += ["–" if score is None else str(score), *[""] * (len(kinds) - 1)]
    cells.append(["each adapter alone", *alone])
    for line in lines:
        shown = [line.label]
        for arm in arms:
            expected = len(table.singles[arm].scores)
            shown.append(_text(line.cell(arm).published, expected))
            if not per_task:
                shown.append(_text(line.cell(arm).best, expected, weights=True))
        cells.append(shown)
    return cells


def _text(outcome: Outcome, seeds: int, *, weights: bool = False) -> str:
    if outcome.score is None:
        return "–"
    text = str(outcome.score)
    if (kept := outcome.retained) is not None:
        spread = "" if kept.spread is None else f" ± {100 * kept.spread:.0f}"
        text += f" ({100 * kept.mean:.0f}{spread} %)"
    if weights:
        text += f" at {weights_text(outcome)}"
    if len(outcome.scores) < seeds:
        text += f", {len(outcome.scores)} of {seeds} seeds"
    return text


def weights_text(outcome: Outcome) -> str:
    """The weights of the seeds, each named once."""
    return ", ".join(f"{w:g}" for w in sorted(set(outcome.weights.values())))


def markdown_methods(table: MethodTable) -> str:
    """The tables as Markdown, with what they need to be read and what is left out of them."""
    parts = [caption(table)]
    for per_task in (False, True):
        cells = grid(table, per_task=per_task)
        if not cells:
            continue
        if per_task:
            parts.append(
                "These leave one update per task: the task must be known when the model runs."
            )
        parts.append(markdown_grid(cells))
    if table.notices:
        parts.append("\n".join(f"- {notice}" for notice in table.notices))
    return "\n\n".join(parts) + "\n"


def caption(table: MethodTable) -> str:
    """How the cells are to be read, in a few sentences."""
    seeds = max((len(o.scores) for o in table.singles.values()), default=0)
    tasks = len(table.tasks)
    text = (
        f"Mean score × 100 over {tasks} task{'' if tasks == 1 else 's'} and, in brackets, the "
        "share kept of what the same seed's adapters score alone; "
    )
    text += (
        f"± is the standard deviation over {seeds} seeds."
        if seeds > 1
        else "one seed, so no spread."
    )
    return (
        f"{text} As published: the method's own options at weight 1. Best weight: the weight of "
        "every update that scores best on selection rows, for each seed, scored on test rows."
    )


def methods_json(table: MethodTable) -> list[dict[str, Any]]:
    """The table in long form at full precision: an entry for each method and arm."""
    entries: list[dict[str, Any]] = []
    for line in table.lines:
        for arm in table.arms:
            cell = line.cell(arm)
            entries.append(
                {
                    "method": line.label,
                    "arm": arm,
                    "per_task": line.per_task,
                    "published": _json(cell.published),
                    "best": _json(cell.best),
                }
            )
    return entries


def _json(outcome: Outcome) -> dict[str, Any] | None:
    score, retained = outcome.score, outcome.retained
    if score is None:
        return None
    return {
        "mean": score.mean,
        "spread": score.spread,
        "retained": retained and retained.mean,
        "retained_spread": retained and retained.spread,
        "weights": {str(seed): weight for seed, weight in outcome.weights.items()},
        "seeds": list(score.seeds),
    }
