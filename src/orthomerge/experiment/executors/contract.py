"""What an executor is, and what the ones that do several steps at once share."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.schedule import Schedule
from orthomerge.experiment.steps import Step
from orthomerge.experiment.workspace import Workspace
from orthomerge.io.files import disk_error
from orthomerge.io.rows import ResultRow


class Executor(Protocol):
    """Carries out the steps of a schedule until there is none left.

    It takes steps from `schedule.ready()`, tells `schedule.began`, hands every row to
    `schedule.row` and ends a step with `schedule.done`, or with `schedule.lost` where its worker
    died. Work in this process is done by `space`; another process makes one of its own from the
    same recipe and folder.
    """

    def carry_out(self, schedule: Schedule, space: Workspace) -> None:
        """Do every step, in an order that keeps to what steps need."""
        ...


class Outcome(NamedTuple):
    """How a step ended in another process, in values that can be sent.

    `value` are the costs of a step that is "done", else words: a sentence for the user where it was
    a "mistake", the reason where the step was "lost", a trace where it "broke".
    """

    event: Literal["done", "mistake", "lost", "broke"]
    value: Any
    rows: list[ResultRow]


def attempt(space: Workspace, step: Step, emit: Callable[[ResultRow], None]) -> Outcome:
    """Do a step in a worker; whatever happens is an outcome. Rows are handed to `emit` too."""
    rows: list[ResultRow] = []

    def keep(row: ResultRow) -> None:
        rows.append(row)
        emit(row)

    try:
        return Outcome("done", space.perform(step, keep), rows)
    except Exception as problem:
        return failure(problem, space.exp.output, rows)


def failure(problem: Exception, output: str | Path, rows: list[ResultRow]) -> Outcome:
    """What an exception means: the user's mistake, a lack of memory, or a fault of ours."""
    said = problem if isinstance(problem, OrthomergeError) else disk_error(problem, output)
    if said is not None:
        return Outcome("mistake", str(said), rows)
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return Outcome("lost", "it ran out of memory", rows)
    return Outcome("broke", "".join(traceback.format_exception(problem)), rows)


class Crew(ABC):
    """Several steps at once: hands out what is ready, collects, and ends in an orderly way.

    After a failure nothing new is handed out; steps at work are finished, and the first failure is
    then raised.
    """

    def __init__(self, schedule: Schedule, space: Workspace) -> None:
        self.schedule, self.exp = schedule, space.exp
        self._failure: Exception | None = None

    def work(self) -> None:
        """Do every step.

        Raises:
            OrthomergeError: a step was a mistake, or was lost too often.
            RuntimeError: a fault of ours.
        """
        while True:
            if self._failure is None:
                self.attempt(self.hand_out)
            if not self.is_busy():
                break
            self.collect()
        if self._failure is not None:
            raise self._failure

    @abstractmethod
    def hand_out(self) -> None:
        """Begin the steps that are ready and that there is room for."""

    @abstractmethod
    def is_busy(self) -> bool:
        """Whether a step is at work."""

    @abstractmethod
    def collect(self) -> None:
        """Wait until something happens, and pass it on."""

    def attempt(self, do: Callable[..., None], *what: Any) -> None:
        """Do something; the first failure is kept."""
        try:
            do(*what)
        except (OrthomergeError, RuntimeError) as problem:
            self._failure = self._failure or problem

    def ended(self, step: Step, outcome: Outcome) -> None:
        """Tell the schedule how a step ended."""
        for row in outcome.rows:
            self.attempt(self.schedule.row, row)
        self.attempt(self._settle, step, outcome)

    def _settle(self, step: Step, outcome: Outcome) -> None:
        if outcome.event == "done":
            self.schedule.done(step, outcome.value)
        elif outcome.event == "lost":
            self.schedule.lost(step, outcome.value)
        elif outcome.event == "mistake":
            raise OrthomergeError(outcome.value)
        else:
            title = step.title(self.exp)
            raise RuntimeError(f"the job '{title}' broke:\n{outcome.value}")
