"""What a run reports while it works; the command line draws it."""

from __future__ import annotations

from collections.abc import Iterable

from orthomerge.io.rows import ResultRow


class Reporter:
    """Called at every stage, every step in it, and every row; it says nothing until overridden."""

    def total(self, units: int) -> None:
        """The size of the whole run, in units of one evaluation."""

    def advance(self, units: int) -> None:
        """Units done."""

    def jobs(self, done: int, of: int) -> None:
        """The jobs done in this sitting, of how many."""

    def stage(self, description: str, worker: int = 0) -> None:
        """A unit of work begins; workers that are at work at once have numbers."""

    def step(self, done: int, of: int, worker: int = 0) -> None:
        """How far the step is."""

    def idle(self, worker: int) -> None:
        """A worker has nothing to do for now."""

    def known(self, rows: Iterable[ResultRow]) -> None:
        """Results of earlier sittings, before the first new one."""

    def row(self, row: ResultRow) -> None:
        """A result."""
