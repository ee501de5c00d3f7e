"""The driver's board: which jobs can be done now, which are being done, what came of them.

Only the driver writes rows and the journal; a job, wherever it runs, writes its own piece.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.costs import Costs
from orthomerge.experiment.graph import Graph
from orthomerge.experiment.jobs import Evaluation, Job
from orthomerge.experiment.progress import Reporter
from orthomerge.io.files import append_lines
from orthomerge.io.rows import ResultRow, append_rows

# How many evaluations one training takes about as long as; only the progress bar rests on it.
TRAINING_UNITS = 6


class Board:
    """The jobs of one run; an executor takes them from here and says what became of them.

    A job whose worker died is handed out again, up to `retries` times.
    """

    def __init__(
        self,
        graph: Graph,
        rows: dict[str, ResultRow],
        *,
        results: Path,
        journal: Path,
        reporter: Reporter,
        retries: int = 2,
    ) -> None:
        self._graph, self.rows, self.reporter = graph, rows, reporter
        self._results, self._journal, self._retries = results, journal, retries
        self.costs = Costs()
        self._todo: dict[str, Job] = {}
        self._taken: set[str] = set()
        self._lost: Counter[str] = Counter()
        self._there: set[Path] = set()
        self._finished = self._told = 0
        reporter.known(rows.values())
        self._refresh()

    def ready(self) -> list[Job]:
        """The jobs that can be done now, in the recipe's order; empty at the end, or for now."""
        return [
            job
            for job in self._todo.values()
            if job.id not in self._taken and not any(need in self._todo for need in job.needs)
        ]

    def todo(self) -> list[Job]:
        """All jobs that are open as far as rows decide it, those at work included."""
        return list(self._todo.values())

    def began(self, job: Job, worker: str = "here") -> None:
        """A job was handed out."""
        self._taken.add(job.id)
        self._note("began", job, worker=worker)

    def row(self, row: ResultRow) -> None:
        """A result: it is on disk before this returns."""
        append_rows(self._results, [row])
        self.rows[row.key] = row
        self.reporter.row(row)
        self._tell()

    def done(self, job: Job, costs: Costs) -> None:
        """A job is finished: its piece is in the output folder, its rows were handed in."""
        self.costs.add(costs)
        self._note("done", job, seconds={k: round(v, 3) for k, v in costs.seconds.items()})
        self._taken.discard(job.id)
        self._todo.pop(job.id, None)
        self._finished += 1
        if job.kind in ("eval", "merge"):
            self._refresh()
        self._tell()

    def ended(self, job: Job, event: str, value: Any) -> None:
        """A job came to an end in another process, which told it as `executors.worker.told` does.

        Raises:
            OrthomergeError: it was a mistake, or it was lost once too often.
            RuntimeError: a fault of ours; `value` is its trace.
        """
        if event == "done":
            self.done(job, value)
        elif event == "lost":
            self.lost(job, value)
        elif event == "mistake":
            raise OrthomergeError(value)
        else:
            raise RuntimeError(f"the job '{job.title}' broke:\n{value}")

    def lost(self, job: Job, reason: str) -> None:
        """The worker died under a job, which is therefore handed out again.

        Raises:
            OrthomergeError: it was the last attempt.
        """
        self._taken.discard(job.id)
        self._lost[job.id] += 1
        self._note("lost", job, reason=reason)
        if self._lost[job.id] > self._retries:
            raise OrthomergeError(
                f"the job '{job.title}' was given up after {self._lost[job.id]} attempts "
                f"({reason}): everything finished is kept, and the same command goes on there."
            )

    def wanted(self, *, assume: bool = False) -> list[str]:
        """The keys of the recipe's rows, in its order; `assume` as in `Graph.evaluations`."""
        asked = self.asked(assume=assume)
        return list(dict.fromkeys(key for each in asked for _, key in each.keys))

    def asked(self, *, assume: bool = False) -> list[Evaluation]:
        """All that the recipe asks, as `Graph.evaluations`."""
        return self._graph.evaluations(self.rows, assume=assume)

    def _refresh(self) -> None:
        """Ask the graph again, since rows may have decided something."""
        asked = self._graph.evaluations(self.rows)
        self._todo = self._graph.jobs(asked, self.rows, self._is_there)
        whole = self._graph.evaluations(self.rows, assume=True)
        self._all_jobs = len(self._graph.jobs(whole, self.rows, self._is_there))
        self._all_jobs += self._finished
        self._asked = asked
        self.reporter.total(_units(whole))
        self._tell()

    def _is_there(self, path: Path) -> bool:
        if path not in self._there and path.exists():
            self._there.add(path)
        return path in self._there

    def _tell(self) -> None:
        """Say how much is done: rows that are there, adapters that need no training any more."""
        open_jobs = [job for job in self._todo.values() if job.kind == "train"]
        missing = sum(key not in self.rows for asked in self._asked for _, key in asked.keys)
        units = _units(self._asked) - missing - TRAINING_UNITS * len(open_jobs)
        self.reporter.advance(units - self._told)
        self._told = units
        self.reporter.jobs(self._finished, self._all_jobs)

    def _note(self, event: str, job: Job, **more: object) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "event": event, "kind": job.kind, "job": job.id, **more}
        append_lines(self._journal, [json.dumps(line, ensure_ascii=False)])


def _units(asked: list[Evaluation]) -> int:
    """The size of evaluations and the trainings behind them, in units of one evaluation."""
    rows = sum(len(each.keys) for each in asked)
    alone = {
        (each.arm, each.seed, each.rate, each.keys[0][0]) for each in asked if each.merge is None
    }
    return rows + TRAINING_UNITS * len(alone)
