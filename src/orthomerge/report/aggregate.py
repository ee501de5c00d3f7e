"""Result rows to means, spreads and retained shares: plain aggregation, nothing drawn.

A seed counts for a cell only once it is scored on every task, so that no mean compares different
sets of tasks.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.report.summary import PLAIN, ArmSummary, Cell, Column, Score, Selection, Summary

_K = TypeVar("_K", bound=Hashable)
_Values = dict[tuple[str, Column, int], dict[str, float]]
"""Each task's score, by arm, column and seed."""


def by_task(
    rows: Iterable[ResultRow], key: Callable[[ResultRow], _K]
) -> dict[_K, dict[str, float]]:
    """Each task's score by what `key` says of a row; the last of several rows counts."""
    found: dict[_K, dict[str, float]] = {}
    for row in rows:
        found.setdefault(key(row), {})[row.task] = float(row.value)
    return found


def mean_over(tasks: Sequence[str], scores: Mapping[str, float]) -> float | None:
    """The mean over tasks, None while one of them is not scored."""
    return statistics.fmean(scores[t] for t in tasks) if scores.keys() >= set(tasks) else None


def column_of(row: ResultRow) -> Column:
    """The column a row belongs to."""
    if row.method == SINGLE:
        return Column(SINGLE)
    return merge_column(row.method, row.weight, row.options)


def merge_column(method: str, weight: float | None, options: Mapping[str, Any] | None) -> Column:
    """The column of a merge by a method at a weight."""
    said = ", ".join(f"{k}={_plain(v)}" for k, v in sorted((options or {}).items()))
    return Column(method, None if weight is None else float(weight), said)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _ordered(columns: Iterable[Column]) -> list[Column]:
    """Single, then the plain sum by weight, then the other methods as they came, by weight."""
    found = _unique(columns)
    groups = _unique(c.group for c in found)

    def place(column: Column) -> tuple[Any, ...]:
        rank = 0 if column.method == SINGLE else 1 if column.method == PLAIN else 2
        return (
            rank,
            groups.index(column.group),
            -math.inf if column.weight is None else column.weight,
        )

    return sorted(found, key=place)


def summarize(
    rows: Iterable[ResultRow],
    tasks: Sequence[str] = (),
    arm_tasks: Mapping[str, Sequence[str]] | None = None,
) -> Summary:
    """Aggregate `rows`; `tasks` names the tasks of the run where more are known than have rows.

    `arm_tasks` names the tasks of arms that have not all of them: their means are over those.
    """
    given = list(rows)
    kept = [r for r in given if math.isfinite(r.value)]
    test = [r for r in kept if r.split == "test"]
    names = _unique([*tasks, *(r.task for r in kept)])
    # An arm reports one learning rate: that of its latest test row.
    chosen = {r.arm: r.learning_rate for r in test}
    current = [r for r in test if r.learning_rate == chosen[r.arm]]
    values = by_task(current, lambda r: (r.arm, column_of(r), r.seed))
    replaced = len(current) - sum(map(len, values.values()))
    columns = _ordered(c for _, c, _ in values)
    arms = [_arm(name, i, kept) for i, name in enumerate(_unique(r.arm for r in kept))]
    expected = {a.name: (arm_tasks or {}).get(a.name, names) for a in arms}
    means = {at: mean_over(expected[at[0]], scores) for at, scores in values.items()}
    unfinished = {at: len(values[at]) for at, mean in means.items() if mean is None}
    by_cell: dict[tuple[str, Column], dict[int, float]] = {}
    for (arm, column, seed), mean in means.items():
        if mean is not None:
            by_cell.setdefault((arm, column), {})[seed] = mean
    return Summary(
        tasks=names,
        metrics={r.task: r.metric for r in kept},
        majority={r.task: r.majority for r in test if _finite(r.majority)},  # type: ignore[misc]
        arms=arms,
        columns=columns,
        cells={(a.name, c): _cell(a.name, c, by_cell, unfinished) for a in arms for c in columns},
        per_task=_per_task(values, by_cell, arms, columns, names),
        selection=_selection(
            [r for r in kept if r.split == "selection" and r.method == SINGLE], names, chosen
        ),
        notices=[
            *_left_out(len(given) - len(kept), len(test) - len(current), replaced),
            *_not_whole(unfinished, expected),
            *_with_fewer([a for a in arm_tasks or {} if a in expected], expected, len(names)),
        ],
        rows=len(given),
    )


def _cell(
    arm: str,
    column: Column,
    means: Mapping[tuple[str, Column], dict[int, float]],
    unfinished: Mapping[tuple[str, Column, int], int],
) -> Cell:
    by_seed, own = means.get((arm, column), {}), means.get((arm, Column(SINGLE)), {})
    begun = {seed: n for (a, c, seed), n in unfinished.items() if (a, c) == (arm, column)}
    return Cell(Score.of(by_seed), _share(by_seed, own), begun)


def _per_task(
    values: _Values,
    means: Mapping[tuple[str, Column], dict[int, float]],
    arms: Sequence[ArmSummary],
    columns: Sequence[Column],
    tasks: Sequence[str],
) -> dict[tuple[str, Column, str], Score]:
    """Scores task by task over seeds that are whole; where there is none yet, what there is."""
    found: dict[tuple[str, Column, str], dict[int, float]] = {}
    for (arm, column, seed), scores in values.items():
        whole = means.get((arm, column))
        if whole is None or seed in whole:
            for task, score in scores.items():
                found.setdefault((arm, column, task), {})[seed] = score
    order = [(a.name, c, t) for a in arms for c in columns for t in tasks]
    return {at: score for at in order if (score := Score.of(found.get(at, {}))) is not None}


def _left_out(endless: int, earlier: int, replaced: int) -> Iterator[str]:
    """What is said of rows that nothing shown rests on."""
    if endless:
        yield f"{_count(endless, 'row')} without a finite score left out."
    if earlier:
        yield (
            f"{_count(earlier, 'test row')} of an arm's earlier learning rate "
            "left out: each arm is shown at the rate of its latest row."
        )
    if replaced:
        yield (
            f"{_count(replaced, 'row')} replaced by a later row of the same arm, merge, task and "
            "seed (an earlier recipe, or merges that differ in rank alone)."
        )


def _not_whole(
    unfinished: Mapping[tuple[str, Column, int], int], expected: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    for (arm, column, seed), scored in unfinished.items():
        where = "own adapters" if column.method == SINGLE else column.label
        yield (
            f"{arm}, {where}, seed {seed}: {scored} of {len(expected[arm])} tasks so far; "
            "not in the means."
        )


def _with_fewer(
    arms: Iterable[str], expected: Mapping[str, Sequence[str]], tasks: int
) -> Iterator[str]:
    for arm in arms:
        if (own := len(expected[arm])) < tasks:
            yield f"{arm} has {own} of the {tasks} tasks: its means are over those."


def _share(merged: dict[int, float], own: dict[int, float]) -> float | None:
    """Mean merged score over mean single score, over the seeds that have both."""
    both = [s for s in merged if s in own]
    base = sum(own[s] for s in both)
    return sum(merged[s] for s in both) / base if both and base > 0 else None


def _finite(value: float | None) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _arm(name: str, slot: int, rows: list[ResultRow]) -> ArmSummary:
    mine = [r for r in rows if r.arm == name]
    test = [r for r in mine if r.split == "test"]
    last = (test or mine)[-1]
    return ArmSummary(
        name=name,
        slot=slot,
        start=last.start,
        solver=last.solver,
        granularity=last.granularity,
        constraint=last.constraint,
        learning_rate=last.learning_rate,
        seeds=tuple(sorted({r.seed for r in test})),
    )


def _selection(rows: list[ResultRow], tasks: list[str], chosen: dict[str, float]) -> Selection:
    means: dict[tuple[str, float], dict[int, float]] = {}
    found = by_task(rows, lambda r: (r.arm, r.learning_rate, r.seed))
    for (arm, rate, seed), values in found.items():
        if (mean := mean_over(tasks, values)) is not None:
            means.setdefault((arm, rate), {})[seed] = mean
    scores = {key: score for key, m in means.items() if (score := Score.of(m)) is not None}
    return Selection(sorted({r.learning_rate for r in rows}), scores, dict(chosen))


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
