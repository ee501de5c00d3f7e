"""The driver's schedule: which steps can be done now, what came of them, and all rows.

Only the driver writes rows and the journal; a step, wherever it runs, writes its own artifact.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.choices import asked, steps_behind
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.measured import Costs
from orthomerge.experiment.progress import Reporter
from orthomerge.experiment.steps import AdapterStep, EvaluateStep, MergeStep, Scoring, Step
from orthomerge.io.files import append_lines
from orthomerge.io.rows import ResultRow, append_rows

# How many evaluations one training takes about as long as; only the progress bar rests on it.
TRAINING_UNITS = 6


class Schedule:
    """The steps of one run; an executor takes them from here and says what became of them.

    A step whose worker died is handed out again, up to `retries` times.
    """

    def __init__(
        self,
        exp: Experiment,
        rows: dict[str, ResultRow],
        *,
        results: Path,
        journal: Path,
        reporter: Reporter,
        retries: int = 2,
    ) -> None:
        self.exp, self.rows, self.reporter = exp, rows, reporter
        self._results, self._journal, self._retries = results, journal, retries
        self.costs = Costs()
        self._open: dict[str, Step] = {}
        self._needs: dict[str, list[str]] = {}
        self._taken: set[str] = set()
        self._lost: Counter[str] = Counter()
        self._there: set[Path] = set()
        self._finished = self._told = 0
        reporter.known(rows.values())
        self._refresh()

    def ready(self) -> list[Step]:
        """The steps that can be done now, in the recipe's order; empty at the end, or for now."""
        return [
            self._narrowed(step)
            for name, step in self._open.items()
            if name not in self._taken and not any(n in self._open for n in self._needs[name])
        ]

    def _narrowed(self, step: Step) -> Step:
        """A merge asks only for the rows that are missing."""
        if isinstance(step, MergeStep):
            return replace(step, only=tuple(step.missing(self.exp, self.rows)))
        return step

    def open(self) -> list[Step]:
        """All steps that are open as far as rows decide it, those at work included."""
        return list(self._open.values())

    def began(self, step: Step, worker: str = "this process") -> None:
        """A step was handed out."""
        self._taken.add(step.name(self.exp))
        self._note("began", step, worker=worker)

    def row(self, row: ResultRow) -> None:
        """A result: it is on disk before this returns. One that is known already is left."""
        if row.key in self.rows:
            return
        append_rows(self._results, [row])
        self.rows[row.key] = row
        self.reporter.row(row)
        self._tell()

    def done(self, step: Step, costs: Costs) -> None:
        """A step is finished: its artifact is in the output folder, its rows were handed in."""
        self.costs.add(costs)
        self._note("done", step, seconds={k: round(v, 3) for k, v in costs.seconds.items()})
        name = step.name(self.exp)
        self._taken.discard(name)
        self._open.pop(name, None)
        self._finished += 1
        if isinstance(step, Scoring):
            self._refresh()
        self._tell()

    def lost(self, step: Step, reason: str) -> None:
        """The worker died under a step, which is therefore handed out again.

        Raises:
            OrthomergeError: it was the last attempt.
        """
        name = step.name(self.exp)
        self._taken.discard(name)
        self._lost[name] += 1
        self._note("lost", step, reason=reason)
        if self._lost[name] > self._retries:
            raise OrthomergeError(
                f"the job '{step.title(self.exp)}' was given up after {self._lost[name]} attempts "
                f"({reason}): everything finished is kept, and the same command goes on there."
            )

    def wanted(self, *, assume: bool = False) -> list[str]:
        """The keys of the recipe's rows, in its order; `assume` as in `asked`."""
        keys = (self.exp.row_keys(step).values() for step in self.asked(assume=assume))
        return list(dict.fromkeys(key for each in keys for key in each))

    def asked(self, *, assume: bool = False) -> list[Scoring]:
        """All that the recipe asks, as far as rows decide it."""
        return asked(self.exp, self.rows, assume=assume)

    def _refresh(self) -> None:
        """Ask the recipe again, since rows may have decided something."""
        self._asked = self.asked()
        self._open = steps_behind(self.exp, self._asked, self.rows, self._is_there)
        self._needs = {
            name: [need.name(self.exp) for need in step.needs(self.exp)]
            for name, step in self._open.items()
        }
        whole = self.asked(assume=True)
        self._all = len(steps_behind(self.exp, whole, self.rows, self._is_there)) + self._finished
        self.reporter.total(self._units(whole))
        self._tell()

    def _is_there(self, path: Path) -> bool:
        if path not in self._there and path.exists():
            self._there.add(path)
        return path in self._there

    def _tell(self) -> None:
        """Say how much is done: rows that are there, adapters that need no training any more."""
        trainings = sum(isinstance(step, AdapterStep) for step in self._open.values())
        missing = sum(len(step.missing(self.exp, self.rows)) for step in self._asked)
        units = self._units(self._asked) - missing - TRAINING_UNITS * trainings
        self.reporter.advance(units - self._told)
        self._told = units
        self.reporter.jobs(self._finished, self._all)

    def _units(self, evaluations: Iterable[Scoring]) -> int:
        """The size of evaluations and the trainings behind them, in units of one evaluation."""
        steps = list(evaluations)
        rows = sum(len(self.exp.row_keys(step)) for step in steps)
        trained = {
            adapter
            for step in steps
            if isinstance(step, EvaluateStep)
            for adapter in step.adapters(self.exp).values()
        }
        return rows + TRAINING_UNITS * len(trained)

    def _note(self, event: str, step: Step, **more: object) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "event": event, "kind": step.kind, "job": step.name(self.exp), **more}
        append_lines(self._journal, [json.dumps(line, ensure_ascii=False)])
