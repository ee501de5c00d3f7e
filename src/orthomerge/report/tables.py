"""Result rows to means, spreads and retained shares: plain aggregation, nothing drawn.

A seed counts for a cell only once it is scored on every task, so that no mean compares different
sets of tasks. Scores stay on the scale of the rows; only what is shown is multiplied by 100.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orthomerge.rows import SINGLE, ResultRow

PLAIN = "task_arithmetic"
"""The plain weighted sum of all updates."""


@dataclass(frozen=True, order=True)
class Column:
    """One way to use the adapters: each alone, or all merged by `method` at `weight`."""

    method: str
    weight: float | None = None
    options: str = ""

    @property
    def group(self) -> str:
        """The method with its options, without the weight."""
        return f"{self.method} ({self.options})" if self.options else self.method

    @property
    def label(self) -> str:
        """The whole in a few words, such as "sum × 0.3"."""
        name = "sum" if self.method == PLAIN else self.method
        name = f"{name} ({self.options})" if self.options else name
        return name if self.weight is None else f"{name} × {self.weight:g}"


@dataclass(frozen=True)
class Score:
    """A mean over `seeds`; `spread` is the sample standard deviation, None for a single seed."""

    mean: float
    spread: float | None
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, by_seed: dict[int, float]) -> Score | None:
        """The score over the given seeds, None for none."""
        if not by_seed:
            return None
        values = list(by_seed.values())
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, tuple(sorted(by_seed)))

    def __str__(self) -> str:
        return percent(self.mean) + (
            f" ± {percent(self.spread)}" if self.spread is not None else ""
        )


@dataclass(frozen=True)
class Cell:
    """One arm under one column: mean over tasks, and the share kept of the same seeds' singles.

    `unfinished` holds the seeds that are not scored on every task, with how many they have.
    """

    score: Score | None = None
    retained: float | None = None
    unfinished: dict[int, int] = field(default_factory=dict[int, int])


@dataclass(frozen=True)
class Arm:
    """What the rows say about an arm; `slot` is its place, hence its colour in every figure."""

    name: str
    slot: int
    start: str
    solver: str | None
    granularity: str | None
    constraint: str
    learning_rate: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """Mean selection score for each learning rate of each arm, and the rate the arm reports."""

    rates: list[float]
    scores: dict[tuple[str, float], Score]
    chosen: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """Everything the page shows, computed once.

    `cells[arm, column]` is a mean over tasks, `per_task[arm, column, task]` one task's score,
    `notices` sentences about what is missing or odd in the rows.
    """

    tasks: list[str]
    metrics: dict[str, str]
    majority: dict[str, float]
    arms: list[Arm]
    columns: list[Column]
    cells: dict[tuple[str, Column], Cell]
    per_task: dict[tuple[str, Column, str], Score]
    selection: Selection
    notices: list[str]
    rows: int

    @property
    def single(self) -> Column:
        """The column of each task's own adapter alone."""
        return Column(SINGLE)

    @property
    def merges(self) -> list[Column]:
        """Every column that is a merge."""
        return [c for c in self.columns if c.method != SINGLE]

    @property
    def plain(self) -> Column | None:
        """The merge to speak of first: the plain sum at weight 1, else the closest to it."""
        scored = {c: sum(self.cell(a, c).score is not None for a in self.arms) for c in self.merges}
        found = [c for c in self.merges if scored[c]] or self.merges
        if not found:
            return None

        def preference(column: Column) -> tuple[Any, ...]:
            distance = abs((1.0 if column.weight is None else column.weight) - 1)
            return column.method != PLAIN, column.options != "", distance, -scored[column]

        return min(found, key=preference)

    @property
    def seeds(self) -> int:
        """The largest number of seeds behind any cell."""
        return max((len(c.score.seeds) for c in self.cells.values() if c.score), default=0)

    @property
    def uneven(self) -> bool:
        """Whether any mean of the plain sum rests on fewer seeds than its arm has."""
        return any(
            self.short(a, score)
            for a in self.arms
            for c in self.merges
            if c.method == PLAIN and (score := self.cell(a, c).score) is not None
        )

    @staticmethod
    def short(arm: Arm, score: Score) -> bool:
        """Whether a score rests on fewer seeds than its arm has."""
        return len(score.seeds) < len(arm.seeds)

    @property
    def floor(self) -> float | None:
        """What constant answers score, mean over tasks; None where a task does not say."""
        if not self.tasks or set(self.majority) != set(self.tasks):
            return None
        return statistics.fmean(self.majority[t] for t in self.tasks)

    def cell(self, arm: Arm, column: Column) -> Cell:
        """The cell, empty where nothing is scored."""
        return self.cells.get((arm.name, column), Cell())

    def best(self, column: Column) -> set[str]:
        """The arms whose shown score is the column's highest; no arm where only one is scored."""
        shown = {
            a.name: percent(cell.score.mean)
            for a in self.arms
            if (cell := self.cell(a, column)).score is not None
        }
        if len(shown) < 2:
            return set()
        top = max(shown.values(), key=float)
        return {name for name, text in shown.items() if text == top}


def percent(value: float) -> str:
    """A score times 100, one decimal, without a negative zero."""
    text = f"{100 * value:.1f}"
    return "0.0" if text == "-0.0" else text


def column_of(row: ResultRow) -> Column:
    """The column a row belongs to."""
    if row.method == SINGLE:
        return Column(SINGLE)
    options = ", ".join(f"{k}={_plain(v)}" for k, v in sorted((row.options or {}).items()))
    return Column(row.method, None if row.weight is None else float(row.weight), options)


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
    notices: list[str] = []
    kept = [r for r in given if math.isfinite(r.value)]
    if len(kept) < len(given):
        notices.append(f"{_count(len(given) - len(kept), 'row')} without a finite score left out.")
    test = [r for r in kept if r.split == "test"]
    names = _unique([*tasks, *(r.task for r in kept)])

    # An arm reports one learning rate: that of its latest test row.
    chosen = {r.arm: r.learning_rate for r in test}
    current = [r for r in test if r.learning_rate == chosen[r.arm]]
    values: dict[tuple[str, Column, int], dict[str, float]] = {}
    repeated = 0
    for row in current:
        cell = values.setdefault((row.arm, column_of(row), row.seed), {})
        repeated += row.task in cell
        cell[row.task] = float(row.value)
    if len(current) < len(test):
        notices.append(
            f"{_count(len(test) - len(current), 'test row')} of an arm's earlier learning rate "
            "left out: each arm is shown at the rate of its latest row."
        )
    if repeated:
        notices.append(
            f"{_count(repeated, 'row')} replaced by a later row of the same arm, merge, task and "
            "seed (an earlier recipe, or merges that differ in rank alone)."
        )

    columns = _ordered(c for _, c, _ in values)
    arm_names = _unique(r.arm for r in kept)
    means: dict[tuple[str, Column], dict[int, float]] = {}
    unfinished: dict[tuple[str, Column], dict[int, int]] = {}
    for (arm, column, seed), scores in values.items():
        expected = (arm_tasks or {}).get(arm, names)
        if all(t in scores for t in expected):
            mean = statistics.fmean(scores[t] for t in expected)
            means.setdefault((arm, column), {})[seed] = mean
        else:
            unfinished.setdefault((arm, column), {})[seed] = len(scores)
            where = "own adapters" if column.method == SINGLE else column.label
            notices.append(
                f"{arm}, {where}, seed {seed}: {len(scores)} of {len(expected)} tasks so far; "
                "not in the means."
            )

    for arm in (a for a in arm_tasks or {} if a in arm_names):
        count = len((arm_tasks or {})[arm])
        if count < len(names):
            notices.append(
                f"{arm} has {count} of the {len(names)} tasks: its means are over those."
            )
    cells: dict[tuple[str, Column], Cell] = {}
    per_task: dict[tuple[str, Column, str], Score] = {}
    for arm in arm_names:
        own = means.get((arm, Column(SINGLE)), {})
        for column in columns:
            by_seed = means.get((arm, column), {})
            open_seeds = unfinished.get((arm, column), {})
            cells[arm, column] = Cell(Score.of(by_seed), _share(by_seed, own), open_seeds)
            for task in names:
                # Seeds that are whole; where there is none yet, what there is.
                by_task = {
                    seed: scores[task]
                    for (a, c, seed), scores in values.items()
                    if a == arm and c == column and task in scores
                    if seed in by_seed or not by_seed
                }
                if (score := Score.of(by_task)) is not None:
                    per_task[arm, column, task] = score

    return Summary(
        tasks=names,
        metrics={r.task: r.metric for r in kept},
        majority={r.task: r.majority for r in test if _finite(r.majority)},  # type: ignore[misc]
        arms=[_arm(name, i, kept) for i, name in enumerate(arm_names)],
        columns=columns,
        cells=cells,
        per_task=per_task,
        selection=_selection(
            [r for r in kept if r.split == "selection" and r.method == SINGLE], names, chosen
        ),
        notices=notices,
        rows=len(given),
    )


def _share(merged: dict[int, float], own: dict[int, float]) -> float | None:
    """Mean merged score over mean single score, over the seeds that have both."""
    both = [s for s in merged if s in own]
    base = sum(own[s] for s in both)
    return sum(merged[s] for s in both) / base if both and base > 0 else None


def _finite(value: float | None) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _arm(name: str, slot: int, rows: list[ResultRow]) -> Arm:
    mine = [r for r in rows if r.arm == name]
    test = [r for r in mine if r.split == "test"]
    last = (test or mine)[-1]
    return Arm(
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
    values: dict[tuple[str, float, int], dict[str, float]] = {}
    for row in rows:
        values.setdefault((row.arm, row.learning_rate, row.seed), {})[row.task] = float(row.value)
    means: dict[tuple[str, float], dict[int, float]] = {}
    for (arm, rate, seed), scores in values.items():
        if len(scores) == len(tasks):
            means.setdefault((arm, rate), {})[seed] = statistics.fmean(scores[t] for t in tasks)
    scores = {key: score for key, m in means.items() if (score := Score.of(m)) is not None}
    return Selection(sorted({r.learning_rate for r in rows}), scores, dict(chosen))


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
