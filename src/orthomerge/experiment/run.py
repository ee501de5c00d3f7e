"""A recipe carried out in one output folder: locked, resumed, and left in the recipe's order.

The steps that the recipe asks for stand on a schedule; an executor does them, in this process, in
several or on a cluster. A run that was stopped, or whose rows alone were kept, goes on with what is
missing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.analyses import keep_analyses
from orthomerge.experiment.executors import Executor, SerialExecutor
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.progress import Reporter
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.record import write_record, write_scores
from orthomerge.experiment.schedule import Schedule
from orthomerge.experiment.steps import StatisticsStep, adapter_step
from orthomerge.experiment.workspace import Workspace
from orthomerge.io.disk import sweep
from orthomerge.io.files import holds, write_text
from orthomerge.io.outputs import require_resumable
from orthomerge.io.rows import ResultRow, read_rows
from orthomerge.statistics import Statistics

ROWS, RUN, RECIPE, JOURNAL = "results.jsonl", "run.json", "recipe.yaml", "jobs.jsonl"
LOCK, OTHER_ROWS = ".lock", "results-of-other-recipes.jsonl"


class Run:
    """One recipe in one output folder."""

    def __init__(
        self,
        recipe: Recipe,
        output: str | Path,
        *,
        text: str = "",
        command: str = "",
        reporter: Reporter | None = None,
        executor: Executor | None = None,
        retries: int = 2,
    ) -> None:
        self.recipe = recipe
        self.output = Path(output)
        self.exp = Experiment(recipe, output)
        self._reporter = reporter or Reporter()
        self.space = Workspace(self.exp, self._reporter)
        self._executor = executor or SerialExecutor()
        self._text, self._command, self._retries = text, command, retries

    @property
    def arm_tasks(self) -> dict[str, list[str]]:
        """The tasks of every arm that has tasks of its own."""
        own = [arm for arm, part in self.recipe.arms.items() if part.tasks is not None]
        return {arm: self.exp.tasks_of(arm) for arm in own}

    def statistics(self, task: str) -> Statistics:
        """A task's statistics, as merging methods read them: from the folder, or collected now."""
        return self.space.get(StatisticsStep.for_merging(self.exp)[task])

    def adapter(self, arm: str, task: str, seed: int, rate: float) -> Path:
        """The folder of a task's adapter, trained now if it is not there."""
        return self.space.get(adapter_step(self.exp, arm, task, seed, rate))

    def check(self) -> None:
        """Refuse, before anything is written, what could not be carried out.

        Raises:
            AssetError: the base model or a task's data cannot be found.
            UnknownNameError: a target matches no layer.
            TaskError: a task with one label or too few rows.
            SubspaceError: a rank larger than a layer.
        """
        self.exp.check()

    def execute(self) -> list[ResultRow]:
        """Do what is missing; returns the rows that belong to this recipe, old and new.

        Raises:
            OutputError: the folder holds something that is no run, or it contains an input.
            OrthomergeError: another run is at work in the same folder, or what `check` raises.
        """
        check_output(self.recipe, self.output)
        self.check()
        with self._alone():
            began = datetime.now(UTC).isoformat(timespec="seconds")
            if self._text:
                write_text(self.output / RECIPE, self._text)
            schedule = Schedule(
                self.exp,
                known_rows(self.output),
                results=self.output / ROWS,
                journal=self.output / JOURNAL,
                reporter=self._reporter,
                retries=self._retries,
            )
            try:
                self._executor.carry_out(schedule, self.space)
                rows = self._settle(schedule)
                write_scores(self.exp, schedule.asked(), rows)
                schedule.costs.add(keep_analyses(self.space, rows))
            except BaseException:
                # What stopped the run is what is reported, also where the record cannot be written.
                with suppress(OrthomergeError):
                    self._write_record(schedule, began)
                raise
            self._write_record(schedule, began)
            return rows

    @contextmanager
    def _alone(self) -> Generator[None, None, None]:
        """The output folder for this run only, without what a killed one left half-written."""
        lock = FileLock(self.output / LOCK)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise OrthomergeError(
                f"another run is at work in '{self.output}': wait for it, or choose another "
                "--output."
            ) from problem
        except OSError as problem:
            raise OrthomergeError(
                f"cannot write in '{self.output}': {problem.strerror or problem}; choose another "
                "--output."
            ) from problem
        try:
            sweep(self.output)
            yield
        finally:
            lock.release()

    def _settle(self, schedule: Schedule) -> list[ResultRow]:
        """Leave the recipe's rows in its order, whatever order they came in, and others aside.

        Rows of an earlier form of the recipe go into a file of their own; they are looked into
        again when the recipe is changed back.
        """
        wanted = schedule.wanted()
        mine = [schedule.rows[key] for key in wanted]
        others = [r for k, r in schedule.rows.items() if k not in set(wanted)]
        for name, rows in ((OTHER_ROWS, others), (ROWS, mine)):
            path = self.output / name
            text = "".join(row.to_json() + "\n" for row in rows)
            if not holds(path, text) and (text or path.exists()):
                write_text(path, text)
        return mine

    def _write_record(self, schedule: Schedule, began: str) -> None:
        about: dict[str, Any] = {
            "name": self.recipe.name,
            "command": self._command,
            "recipe": self._text,
            "started": began,
            "base": self.recipe.base,
            "seeds": self.recipe.all_seeds(),
            "expected_rows": len(schedule.wanted(assume=True)),
        }
        if self.recipe.known:
            about["known"] = [figure.model_dump() for figure in self.recipe.known]
        if self.arm_tasks:
            about["arm_tasks"] = self.arm_tasks
        tasks = list(self.exp.tasks.values())
        write_record(self.output / RUN, about, self.exp.base, tasks, schedule.costs)


def check_output(recipe: Recipe, output: Path) -> None:
    """Refuse a folder that holds something else than a run, or something that the run reads.

    Raises:
        OutputError: the folder is neither free nor a run's, or it contains an input.
    """
    files = [task for task in recipe.tasks if Path(task).is_file()]
    marks = (RUN, JOURNAL, ROWS, OTHER_ROWS)
    began = (output / LOCK).is_file()
    require_resumable(
        output, marks, "run", first=[RECIPE] if began else [], inputs=files, base=recipe.base
    )


def known_rows(folder: Path) -> dict[str, ResultRow]:
    """The rows of a run's folder by key, also those of an earlier form of its recipe."""
    rows: dict[str, ResultRow] = {}
    for name in (OTHER_ROWS, ROWS):
        if (folder / name).is_file():
            rows |= {row.key: row for row in read_rows(folder / name)}
    return rows
