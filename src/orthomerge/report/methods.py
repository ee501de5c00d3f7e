"""Result rows to a table of merging methods: as published, and at the weight chosen for them.

"As published" is a merge with the method's options at weight 1. "Best weight" is, for each arm and
seed, the weight whose mean over the tasks is highest on selection rows (of weights with
equal scores the one closest to 1), and what is shown are its test rows. A seed counts once every
task is scored.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.report.aggregate import by_task, column_of, mean_over
from orthomerge.report.summary import PLAIN, Score

DEFAULT_ARM = "default"
"""The arm whose scores give the order of the methods."""

UNTUNED = 1.0


@dataclass(frozen=True)
class Outcome:
    """Mean scores over all tasks by seed, the shares kept of the same seeds' adapters alone.

    `weights` is the weight every update had, by seed.
    """

    scores: dict[int, float] = field(default_factory=dict[int, float])
    shares: dict[int, float] = field(default_factory=dict[int, float])
    weights: dict[int, float] = field(default_factory=dict[int, float])

    @property
    def score(self) -> Score | None:
        """The score over seeds, None where no seed is whole."""
        return Score.of(self.scores)

    @property
    def retained(self) -> Score | None:
        """The share of the single-task score over seeds."""
        return Score.of(self.shares)


@dataclass(frozen=True)
class MethodCell:
    """One method on one arm; `best` is empty where no weight was chosen."""

    published: Outcome = field(default_factory=Outcome)
    best: Outcome = field(default_factory=Outcome)


@dataclass(frozen=True)
class MethodLine:
    """One method (with its options, where rows give such) over the arms."""

    label: str
    method: str
    per_task: bool
    cells: dict[str, MethodCell]

    def cell(self, arm: str) -> MethodCell:
        """The cell, empty where nothing is whole."""
        return self.cells.get(arm, MethodCell())


@dataclass(frozen=True)
class Gain:
    """One method's best weight against the plain sum's on one arm, seed by seed."""

    by_seed: dict[int, float]
    spread: float | None

    @property
    def mean(self) -> float:
        """The mean difference over the seeds that both have."""
        return statistics.fmean(self.by_seed.values())

    @property
    def clear(self) -> bool:
        """Of one sign in every one of at least two seeds, and larger than the sum's spread."""
        values = list(self.by_seed.values())
        same = all(v > 0 for v in values) or all(v < 0 for v in values)
        return self.spread is not None and len(values) > 1 and same and abs(self.mean) > self.spread


@dataclass(frozen=True)
class MethodTable:
    """What rows say about methods; `lines` are in order of their best-weight score.

    `singles` holds each task's own adapter alone by arm, `notices` what is left out.
    """

    tasks: list[str]
    arms: list[str]
    singles: dict[str, Outcome]
    lines: list[MethodLine]
    notices: list[str]

    @property
    def shared(self) -> list[MethodLine]:
        """The methods that give one update for all tasks."""
        return [line for line in self.lines if not line.per_task]

    @property
    def per_task(self) -> list[MethodLine]:
        """The methods that need to know the task when the model runs."""
        return [line for line in self.lines if line.per_task]

    @property
    def plain(self) -> MethodLine | None:
        """The plain sum."""
        return next((line for line in self.shared if line.label == PLAIN), None)

    def against_plain(self, line: MethodLine, arm: str) -> Gain | None:
        """The method less the plain sum, both at their best weights; None without common seeds."""
        if self.plain is None:
            return None
        mine, sums = line.cell(arm).best, self.plain.cell(arm).best
        both = sorted(mine.scores.keys() & sums.scores.keys())
        if not both:
            return None
        spread = statistics.stdev(sums.scores.values()) if len(sums.scores) > 1 else None
        return Gain({s: mine.scores[s] - sums.scores[s] for s in both}, spread)


class _Means:
    """Mean scores over all tasks by arm, method, split, weight and seed, where all are scored."""

    def __init__(self, rows: Sequence[ResultRow], tasks: Sequence[str]) -> None:
        self.begun = by_task(rows, lambda r: (r.arm, label_of(r), r.split, r.weight, r.seed))
        means = {at: mean_over(tasks, scores) for at, scores in self.begun.items()}
        self.whole = {at: mean for at, mean in means.items() if mean is not None}

    def seeds(self, arm: str, label: str) -> list[int]:
        """The seeds of which there is anything."""
        return sorted({at[4] for at in self.begun if at[:2] == (arm, label)})

    def weights(self, label: str) -> list[float]:
        """The weights any arm or seed has selection rows of."""
        found = {at[3] for at in self.begun if at[1:3] == (label, "selection")}
        return sorted(w for w in found if w is not None)

    def best_weight(self, arm: str, label: str, seed: int) -> float | None:
        """The weight with the best selection score; None while a candidate is not scored."""
        scores = {
            w: self.whole.get((arm, label, "selection", w, seed)) for w in self.weights(label)
        }
        known = {w: s for w, s in scores.items() if s is not None}
        if not known or len(known) < len(scores):
            return None
        return max(known, key=lambda w: (known[w], -abs(w - 1)))


def label_of(row: ResultRow) -> str:
    """The method with the options of the row, as columns of the other tables call it."""
    return column_of(row).group


def method_table(rows: Iterable[ResultRow], per_task: Iterable[str] = ()) -> MethodTable:
    """Aggregate `rows`; `per_task` names the methods that leave one update per task."""
    kept = [r for r in rows if math.isfinite(r.value)]
    rates = {r.arm: r.learning_rate for r in kept if r.split == "test"}
    # Selection rows of single adapters chose the learning rate and are no part of this.
    kept = [
        r
        for r in kept
        if r.learning_rate == rates.get(r.arm) and (r.method != SINGLE or r.split == "test")
    ]
    tasks = list(dict.fromkeys(r.task for r in kept))
    arms = list(dict.fromkeys(r.arm for r in kept))
    means = _Means(kept, tasks)
    singles = {arm: _single(means, arm) for arm in arms}
    apart = set(per_task)
    labels = {label_of(r): r.method for r in kept if r.method != SINGLE}
    lines: list[MethodLine] = []
    notices: list[str] = []
    unfinished: dict[tuple[str, int], list[str]] = {}
    for label, method in labels.items():
        found = {arm: _cell(means, arm, label, singles[arm]) for arm in arms}
        cells = {arm: cell for arm, (cell, _) in found.items()}
        if not any(c.published.scores or c.best.scores for c in cells.values()):
            notices.append(f"{label} is not scored on every task yet and is left out.")
            continue
        lines.append(MethodLine(label, method, method in apart, cells))
        for arm, (_, seeds) in found.items():
            for seed in seeds:
                unfinished.setdefault((arm, seed), []).append(label)
    for (arm, seed), names in unfinished.items():
        notices.append(f"{arm}, seed {seed}, is not finished and left out of {', '.join(names)}.")
    first = DEFAULT_ARM if DEFAULT_ARM in arms else next(iter(arms), "")
    lines.sort(key=lambda line: -_rank(line.cell(first)))
    return MethodTable(tasks, arms, singles, lines, notices)


def _rank(cell: MethodCell) -> float:
    score = cell.best.score or cell.published.score
    return score.mean if score is not None else -math.inf


def _single(means: _Means, arm: str) -> Outcome:
    found = {
        seed: value
        for seed in means.seeds(arm, SINGLE)
        if (value := means.whole.get((arm, SINGLE, "test", None, seed))) is not None
    }
    return Outcome(found, dict.fromkeys(found, 1.0))


def _cell(means: _Means, arm: str, label: str, alone: Outcome) -> tuple[MethodCell, list[int]]:
    """The cell, and the seeds of which not all is there."""
    seeds = means.seeds(arm, label)
    published = _outcome(means, arm, label, dict.fromkeys(seeds, UNTUNED), alone)
    best = Outcome()
    wanted = [published]
    if means.weights(label):
        chosen = {s: w for s in seeds if (w := means.best_weight(arm, label, s)) is not None}
        best = _outcome(means, arm, label, chosen, alone)
        wanted.append(best)
    expected = sorted({*seeds, *alone.scores})
    missing = [s for s in expected if any(s not in outcome.scores for outcome in wanted)]
    return MethodCell(published, best), missing


def _outcome(
    means: _Means, arm: str, label: str, weights: dict[int, float], alone: Outcome
) -> Outcome:
    """The test rows at each seed's weight."""
    scores = {
        seed: value
        for seed, weight in weights.items()
        if (value := means.whole.get((arm, label, "test", weight, seed))) is not None
    }
    shares = {
        seed: value / alone.scores[seed]
        for seed, value in scores.items()
        if alone.scores.get(seed, 0.0) > 0
    }
    return Outcome(scores, shares, {seed: weights[seed] for seed in scores})
