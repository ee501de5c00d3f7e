"""Progress for a person at a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from orthomerge.cli._app import err
from orthomerge.rows import ResultRow


class Report(Protocol):
    """Told how much is done, of how much, and the value so far where there is one."""

    def __call__(self, done: int, of: int, value: float | None = None, /) -> None: ...


@contextmanager
def work_bar(what: str) -> Iterator[Report]:
    """One bar with the time that remains; nothing where there is no terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as progress:
        bar = progress.add_task(what, total=None, value="")

        def report(done: int, of: int, value: float | None = None, /) -> None:
            shown = "" if value is None else f"{value:.4f}"
            progress.update(bar, completed=done, total=of, value=shown)

        yield report


# More workers than these are at work without a bar of their own.
_BARS = 12


class RunProgress:
    """The run's bar and one for the piece each worker is at; without a terminal a line a stage."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._live = console.is_terminal and not quiet
        self._plain = not console.is_terminal and not quiet
        self._last_line = ""
        self._jobs = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._run = self._progress.add_task("[bold]whole run", total=None)
        self._pieces = {0: self._progress.add_task("starting", total=None)}

    def __enter__(self) -> RunProgress:
        """Begin drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._progress.stop()

    def total(self, units: int) -> None:
        """The size of the run."""
        self._progress.update(self._run, total=units)

    def advance(self, units: int) -> None:
        """Units done."""
        self._progress.advance(self._run, units)

    def jobs(self, done: int, of: int) -> None:
        """The jobs done in this sitting."""
        self._jobs = f"{done}/{of}"
        self._progress.update(self._run, description=f"[bold]whole run[/], job {done} of {of}")

    def stage(self, description: str, worker: int = 0) -> None:
        """A piece of work begins."""
        if worker < _BARS:
            if worker not in self._pieces:
                self._pieces[worker] = self._progress.add_task("", total=None)
            self._progress.reset(
                self._pieces[worker], description=description, total=None, visible=True
            )
        if self._plain and description != self._last_line:
            self._console.print(f"[{self._jobs}] {description}", highlight=False, markup=False)
            self._last_line = description

    def step(self, done: int, of: int, worker: int = 0) -> None:
        """Where the piece stands."""
        if worker in self._pieces:
            self._progress.update(self._pieces[worker], completed=done, total=of)

    def idle(self, worker: int) -> None:
        """Nothing to do for now: the worker's bar goes until it has a piece again."""
        if worker in self._pieces:
            self._progress.update(self._pieces[worker], visible=False)

    def row(self, row: ResultRow) -> None:
        """A result; the table at the end shows them all."""
