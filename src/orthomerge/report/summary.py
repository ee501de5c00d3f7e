"""What rows say, as values: arms, columns, scores over seeds, and the whole of a run.

Scores stay on the scale of the rows; only what is shown is multiplied by 100.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from orthomerge.io.rows import SINGLE

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
class ArmSummary:
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
    arms: list[ArmSummary]
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
    def short(arm: ArmSummary, score: Score) -> bool:
        """Whether a score rests on fewer seeds than its arm has."""
        return len(score.seeds) < len(arm.seeds)

    @property
    def floor(self) -> float | None:
        """What constant answers score, mean over tasks; None where a task does not say."""
        if not self.tasks or set(self.majority) != set(self.tasks):
            return None
        return statistics.fmean(self.majority[t] for t in self.tasks)

    def cell(self, arm: ArmSummary, column: Column) -> Cell:
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
