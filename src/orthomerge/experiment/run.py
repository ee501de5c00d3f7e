"""A recipe carried out in one output folder: locked, resumed, and left in the recipe's order.

The graph of the recipe's jobs stands on a board (see `graph`, `board`); an executor does them, in
this process, in several or on a cluster. A run that was stopped, or whose rows alone were kept,
goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.board import Board
from orthomerge.experiment.cards import tell_cards
from orthomerge.experiment.executors import Executor
from orthomerge.experiment.executors.here import Here
from orthomerge.experiment.graph import Graph
from orthomerge.experiment.keys import Keys
from orthomerge.experiment.pieces import Pieces
from orthomerge.experiment.progress import Reporter, Silent
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.record import write_record
from orthomerge.experiment.scores import Scores
from orthomerge.experiment.workshop import Workshop
from orthomerge.io.disk import sweep
from orthomerge.io.files import holds, write_text
from orthomerge.io.outputs import require_resumable
from orthomerge.io.rows import ResultRow, read_rows

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
        self.keys = Keys(recipe, self.output)
        self._reporter = reporter or Silent()
        self._workshop = Workshop(self.keys, self._reporter)
        self._executor = executor or Here()
        self._text, self._command, self._retries = text, command, retries

    @property
    def scores(self) -> Scores:
        """What merges and scores the run's adapters."""
        return self._workshop.scores

    @property
    def pieces(self) -> Pieces:
        """The pieces of the run, made on demand."""
        return self._workshop.pieces

    @property
    def arm_tasks(self) -> dict[str, list[str]]:
        """The tasks of every arm that has tasks of its own."""
        own = [arm for arm, part in self.recipe.arms.items() if part.tasks is not None]
        return {arm: self.keys.tasks_of(arm) for arm in own}

    def check(self) -> None:
        """Refuse, before anything is written, what could not be carried out.

        Raises:
            AssetError: the base model or a task's data cannot be found.
            UnknownNameError: a target matches no layer.
            TaskError: a task with one label or too few rows.
            SubspaceError: a rank larger than a layer.
        """
        self.keys.check()

    def execute(self) -> list[ResultRow]:
        """Do what is missing; returns the rows that belong to this recipe, old and new.

        Raises:
            OutputError: the folder holds something that is no run, or it contains an input.
            OrthomergeError: another run is at work in the same folder, or what `check` raises.
        """
        self._check_output()
        self.check()
        with self._alone():
            began = datetime.now(UTC).isoformat(timespec="seconds")
            if self._text:
                write_text(self.output / RECIPE, self._text)
            board = Board(
                Graph(self.keys),
                self._known_rows(),
                results=self.output / ROWS,
                journal=self.output / JOURNAL,
                reporter=self._reporter,
                retries=self._retries,
            )
            try:
                self._executor.carry_out(board, self._workshop)
                rows = self._settle(board)
                tell_cards(self.keys, board.asked(), rows)
                board.costs.add(self._workshop.keep_evidence(rows))
            except BaseException:
                # What stopped the run is what is told, also where the record cannot be written.
                with suppress(OrthomergeError):
                    self._write_record(board, began)
                raise
            self._write_record(board, began)
            return rows

    def _check_output(self) -> None:
        """A run's folder, or a free one; nothing that is read may lie there before the run."""
        files = [task for task in self.recipe.tasks if Path(task).is_file()]
        marks = (RUN, JOURNAL, ROWS, OTHER_ROWS)
        began = (self.output / LOCK).is_file()
        require_resumable(
            self.output, marks, "run", first=[RECIPE] if began else [], inputs=files,
            base=self.recipe.base,
        )  # fmt: skip

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

    def _known_rows(self) -> dict[str, ResultRow]:
        rows: dict[str, ResultRow] = {}
        for name in (OTHER_ROWS, ROWS):
            if (self.output / name).is_file():
                rows |= {r.key: r for r in read_rows(self.output / name)}
        return rows

    def _settle(self, board: Board) -> list[ResultRow]:
        """Leave the recipe's rows in its order, whatever order they came in, and others aside.

        Rows of an earlier form of the recipe go into a file of their own; they are looked into
        again when the recipe is changed back.
        """
        wanted = board.wanted()
        mine = [board.rows[key] for key in wanted]
        others = [r for k, r in board.rows.items() if k not in set(wanted)]
        for name, rows in ((OTHER_ROWS, others), (ROWS, mine)):
            path = self.output / name
            text = "".join(row.to_json() + "\n" for row in rows)
            if not holds(path, text) and (text or path.exists()):
                write_text(path, text)
        return mine

    def _write_record(self, board: Board, began: str) -> None:
        about: dict[str, Any] = {
            "name": self.recipe.name,
            "command": self._command,
            "recipe": self._text,
            "started": began,
            "base": self.recipe.base,
            "seeds": self.recipe.all_seeds(),
            "expected_rows": len(board.wanted(assume=True)),
        }
        if self.recipe.known:
            about["known"] = [figure.model_dump() for figure in self.recipe.known]
        if self.arm_tasks:
            about["arm_tasks"] = self.arm_tasks
        tasks = list(self.keys.tasks.values())
        write_record(self.output / RUN, about, self.keys.base, tasks, board.costs)
