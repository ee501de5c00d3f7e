"""The graph of a recipe: what it asks, as far as rows decide it, and the jobs that answer it.

A recipe with a choice in it (of a learning rate, of a merge's weight) is not one fixed graph: the
rows of some evaluations decide which others are asked for. So the graph is a function of the rows
that are there. Asked again after every evaluation, it grows until nothing is left to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from orthomerge.experiment.arms import Merge
from orthomerge.experiment.jobs import Evaluation, Job
from orthomerge.experiment.keys import MERGE_GRANULARITY, Keys
from orthomerge.io.files import fingerprint
from orthomerge.io.rows import ResultRow
from orthomerge.merging import get_method

Rows = Mapping[str, ResultRow]


class Graph:
    """The evaluations and the jobs of one recipe."""

    def __init__(self, keys: Keys) -> None:
        self.keys, self.recipe = keys, keys.recipe
        self._asked: dict[tuple[Any, ...], Evaluation] = {}

    # Evaluations --------------------------------------------------------------------------------

    def evaluations(self, rows: Rows, *, assume: bool = False) -> list[Evaluation]:
        """All that the recipe asks as far as `rows` decide it, in the recipe's order.

        With `assume`, a choice that is still open falls somewhere, so that the size of the whole
        run can be told; a weight then falls on one that has to be tested.
        """
        found: list[Evaluation] = []
        for name in self.recipe.arms:
            trials = self._rate_trials(name)
            found += [asked for of_rate in trials.values() for asked in of_rate]
            rate = self._rate(name, trials, rows, assume)
            if rate is None:
                continue
            for seed in self.recipe.seeds_of(name):
                found += [
                    self._single(name, seed, rate, t, "test") for t in self.keys.tasks_of(name)
                ]
                for place in range(len(self.recipe.merges)):
                    found += self._merges(name, seed, rate, place, rows, assume)
        return found

    def _rate_trials(self, name: str) -> dict[float, list[Evaluation]]:
        """The evaluations that an arm's learning rate is chosen by: none where there is one."""
        rates, seed = self.recipe.learning_rates_of(name), self.recipe.seeds_of(name)[0]
        return {
            rate: [self._single(name, seed, rate, t, "selection") for t in self.keys.tasks_of(name)]
            for rate in (rates if len(rates) > 1 else [])
        }

    def _rate(
        self, name: str, trials: dict[float, list[Evaluation]], rows: Rows, assume: bool
    ) -> float | None:
        """The arm's learning rate: the best mean single-task score on the selection split.

        Or the lowest one within the recipe's `rate_tolerance` of it. Chosen at the first seed, for
        all tasks together, never by a merge and never on test rows. None where it is still open.
        """
        rates = self.recipe.learning_rates_of(name)
        if len(rates) == 1:
            return rates[0]
        scores = {rate: _mean(of_rate, rows) for rate, of_rate in trials.items()}
        known = {rate: score for rate, score in scores.items() if score is not None}
        if len(known) < len(scores):
            return min(rates) if assume else None
        enough = max(known.values()) - self.recipe.training.rate_tolerance
        return min(rate for rate, score in known.items() if score >= enough)

    def _merges(
        self, name: str, seed: int, rate: float, place: int, rows: Rows, assume: bool
    ) -> list[Evaluation]:
        """One merge of the recipe: its candidates on selection rows, its weights on test rows."""
        merge = self.recipe.merges[place]
        trials = {
            weight: self._merged(name, seed, rate, place, weight, "selection")
            for weight in ([*merge.weights, *merge.choose_from] if merge.choose_from else [])
        }
        best = _weight(merge, trials, rows, assume)
        weights = list(dict.fromkeys(merge.weights))
        if best is not None and best not in weights:
            weights.append(best)
        return [
            *trials.values(),
            *(self._merged(name, seed, rate, place, weight, "test") for weight in weights),
        ]

    def _single(self, name: str, seed: int, rate: float, task: str, split: str) -> Evaluation:
        asked = (name, seed, rate, task, split)
        if asked not in self._asked:
            adapter = self.keys.adapter_key(name, task, seed, rate)
            key = self.keys.row_key(name, task, split, [adapter], None, 1.0)
            self._asked[asked] = Evaluation(name, seed, rate, split, ((task, key),))
        return self._asked[asked]

    def _merged(
        self, name: str, seed: int, rate: float, place: int, weight: float, split: str
    ) -> Evaluation:
        asked = (name, seed, rate, place, weight, split)
        if asked not in self._asked:
            tasks, merge = self.keys.tasks_of(name), self.recipe.merges[place]
            adapters = [self.keys.adapter_key(name, t, seed, rate) for t in tasks]
            keys = tuple(
                (t, self.keys.row_key(name, t, split, adapters, merge, weight)) for t in tasks
            )
            self._asked[asked] = Evaluation(name, seed, rate, split, keys, place, weight)
        return self._asked[asked]

    # Jobs ---------------------------------------------------------------------------------------

    def jobs(
        self, evaluations: Iterable[Evaluation], rows: Rows, there: Callable[[Path], bool]
    ) -> dict[str, Job]:
        """The jobs behind the evaluations that miss a row, by id; each after those it needs.

        A piece that is `there` needs no job, nor does one that only finished evaluations would
        read.
        """
        return _Jobs(self, rows, there).of(evaluations)


class _Jobs:
    """The jobs of one call, gathered from the evaluations back to the statistics."""

    def __init__(self, graph: Graph, rows: Rows, there: Callable[[Path], bool]) -> None:
        self._keys, self._recipe = graph.keys, graph.recipe
        self._rows, self._there = rows, there
        self._found: dict[str, Job] = {}

    def of(self, evaluations: Iterable[Evaluation]) -> dict[str, Job]:
        for asked in evaluations:
            missing = tuple(task for task, key in asked.keys if key not in self._rows)
            if missing or not self._is_kept(asked):
                self._evaluate(asked, missing)
        return self._found

    def _is_kept(self, asked: Evaluation) -> bool:
        """Whether the merged folder that the recipe keeps is there, where it keeps one."""
        if asked.merge is None or asked.weight is None or asked.split != "test":
            return True
        if not self._recipe.save_merged:
            return True
        merge = self._recipe.merges[asked.merge]
        return self._there(
            self._keys.merged_path(asked.arm, asked.seed, asked.rate, merge, asked.weight)
        )

    def _evaluate(self, asked: Evaluation, missing: tuple[str, ...]) -> None:
        place = (asked.arm, asked.seed, asked.rate)
        needs = [self._adapter(asked.arm, task, *place[1:]) for task, _ in asked.keys]
        where = f"{asked.arm}/seed{asked.seed}"
        if asked.merge is None:
            ((task, key),) = asked.keys
            name = f"eval/{where}/{task}-{asked.split}-{key[:12]}"
            title = f"evaluate {asked.arm} · {task} · own adapter"
            self._add(Job(name, "eval", title, (asked, missing), tuple(needs)))
            return
        merge = self._recipe.merges[asked.merge]
        for need in get_method(merge.method).needs:
            for task in self._keys.tasks_of(asked.arm):
                if need == "moments":
                    targets = self._recipe.arms[asked.arm].targets
                    needs.append(self._stats(task, MERGE_GRANULARITY, targets=targets))
                elif need == "fisher":
                    needs.append(self._fisher(asked.arm, task, *place[1:]))
        key = fingerprint([key for _, key in asked.keys])
        name = f"merge/{where}/{merge.method}-w{asked.weight:g}-{asked.split}-{key[:12]}"
        title = f"merge {asked.arm} · {merge.method} · weight {asked.weight:g}"
        self._add(Job(name, "merge", title, (asked, missing), tuple(needs)))

    def _adapter(self, name: str, task: str, seed: int, rate: float) -> str:
        path = self._keys.adapter_path(name, task, seed, rate)
        if not self._settled(path):
            verb, needs = self._before(name, task, seed, rate)
            title = f"{verb} {name} · {task} · seed {seed} · {rate:g}"
            self._add(Job(self._id(path), "train", title, (name, task, seed, rate), needs))
        return self._id(path)

    def _before(self, name: str, task: str, seed: int, rate: float) -> tuple[str, tuple[str, ...]]:
        """What is done for an adapter, and the jobs before it: a training, or a conversion."""
        arm = self._recipe.arms[name]
        if not arm.convert:
            charged = self._own_stats(name) if arm.constraint == "penalty" else []
            return "train", (self._start(name, task, seed), *charged)
        statistics = self._own_stats(name)
        return "convert", (self._adapter(arm.convert.source, task, seed, rate), *statistics)

    def _own_stats(self, name: str) -> list[str]:
        """The statistics of every task that an arm looks at."""
        arm = self._recipe.arms[name]
        about = (arm.granularity, arm.samples, arm.targets)
        return [self._stats(t, *about) for t in self._keys.tasks_of(name)]

    def _start(self, name: str, task: str, seed: int) -> str:
        path, arm = self._keys.start_path(name, task, seed), self._recipe.arms[name]
        if not self._settled(path):
            needs = [
                self._stats(t, arm.granularity, arm.samples, arm.targets)
                for t in (self._keys.tasks_of(name) if arm.solver else ())
            ]
            title = f"start {name} of {task} · seed {seed}"
            self._add(Job(self._id(path), "start", title, (name, task, seed), tuple(needs)))
        return self._id(path)

    def _stats(
        self,
        task: str,
        granularity: str,
        samples: int | None = None,
        targets: list[str] | None = None,
    ) -> str:
        path = self._keys.stats_path(task, granularity, samples, targets)
        if not self._settled(path):
            title = f"statistics of {task} ({granularity})"
            self._add(Job(self._id(path), "stats", title, (task, granularity, samples, targets)))
        return self._id(path)

    def _fisher(self, name: str, task: str, seed: int, rate: float) -> str:
        path = self._keys.fisher_path(name, task, seed, rate)
        if not self._settled(path):
            needs = (self._adapter(name, task, seed, rate),)
            title = f"Fisher information of {name} · {task} · seed {seed}"
            self._add(Job(self._id(path), "fisher", title, (name, task, seed, rate), needs))
        return self._id(path)

    def _settled(self, path: Path) -> bool:
        return self._id(path) in self._found or self._there(path)

    def _id(self, path: Path) -> str:
        return path.relative_to(self._keys.output).as_posix()

    def _add(self, job: Job) -> None:
        self._found.setdefault(job.id, job)


def _mean(evaluations: Iterable[Evaluation], rows: Rows) -> float | None:
    """The mean score of evaluations, None where a row is missing."""
    keys = [key for asked in evaluations for _, key in asked.keys]
    if any(key not in rows for key in keys):
        return None
    return sum(rows[key].value for key in keys) / len(keys)


def _weight(
    merge: Merge, trials: dict[float, Evaluation], rows: Rows, assume: bool
) -> float | None:
    """The weight of `choose_from` and `weights` with the best mean score on selection rows.

    Of weights that score alike the one closest to 1. None where there is no choice or it is open.
    """
    scores = {weight: _mean([asked], rows) for weight, asked in trials.items()}
    known = {weight: score for weight, score in scores.items() if score is not None}
    if len(known) == len(scores):
        return max(known, key=lambda weight: (known[weight], -abs(weight - 1)), default=None)
    untested = [weight for weight in merge.choose_from if weight not in merge.weights]
    return untested[0] if assume and untested else None
