"""What a run reports while it works; the command line draws it, tests and scripts ignore it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from orthomerge.io.rows import ResultRow


class Reporter(Protocol):
    """Told of every stage, every step in it, and every row."""

    def total(self, units: int) -> None:
        """The size of the whole run, in units of one evaluation."""
        ...

    def advance(self, units: int) -> None:
        """Units done."""
        ...

    def jobs(self, done: int, of: int) -> None:
        """The jobs done in this sitting, of how many."""
        ...

    def stage(self, description: str, worker: int = 0) -> None:
        """A piece of work begins; workers that are at work side by side have numbers."""
        ...

    def step(self, done: int, of: int, worker: int = 0) -> None:
        """Where the piece stands."""
        ...

    def idle(self, worker: int) -> None:
        """A worker has nothing to do for now."""
        ...

    def known(self, rows: Iterable[ResultRow]) -> None:
        """Results of earlier sittings, before the first new one."""
        ...

    def row(self, row: ResultRow) -> None:
        """A result."""
        ...


class Silent:
    """A reporter that says nothing."""

    def total(self, units: int) -> None:
        """Ignored."""

    def advance(self, units: int) -> None:
        """Ignored."""

    def jobs(self, done: int, of: int) -> None:
        """Ignored."""

    def stage(self, description: str, worker: int = 0) -> None:
        """Ignored."""

    def step(self, done: int, of: int, worker: int = 0) -> None:
        """Ignored."""

    def idle(self, worker: int) -> None:
        """Ignored."""

    def known(self, rows: Iterable[ResultRow]) -> None:
        """Ignored."""

    def row(self, row: ResultRow) -> None:
        """Ignored."""
