"""Progress of one unit of work: a bar at a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from orthomerge.io.units import human_duration

# All progress goes here, beside standard output, which belongs to results.
bars = Console(stderr=True)
# Without a terminal no line comes sooner than this after the one before, in seconds.
_EVERY = 15.0


def _be_quiet(value: bool) -> bool:
    bars.quiet = value
    return value


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress.", callback=_be_quiet, is_eager=True)
]
"""The option of every verb that takes long; it silences `bars`, so a verb need not look at it."""


class Report(Protocol):
    """Called with how much is done, of how much, and the value so far where there is one."""

    def __call__(self, done: int, of: int, value: float | None = None, /) -> None: ...


@contextmanager
def work_bar(what: str) -> Generator[Report, None, None]:
    """One bar with the time that remains; lines with the same words where there is no terminal."""
    if not bars.is_terminal:
        yield _Lines(what)
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=bars,
        transient=True,
        disable=bars.quiet,
    ) as progress:
        bar = progress.add_task(what, total=None, value="")

        def report(done: int, of: int, value: float | None = None, /) -> None:
            progress.update(bar, completed=done, total=of, value=_said(value))

        yield report


def adding(report: Report, of: int) -> Callable[..., None]:
    """For work that reports how much more is done, by default one, and not how much in all."""
    done = 0
    report(done, of)

    def advance(more: int = 1) -> None:
        nonlocal done
        done += more
        report(done, of)

    return advance


class _Lines:
    """A line with what is done every now and then; short work says nothing."""

    def __init__(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        self._last = self._began

    def __call__(self, done: int, of: int, value: float | None = None, /) -> None:
        now = time.monotonic()
        if now - self._last < _EVERY:
            return
        self._last = now
        parts = [f"{self._what}: {done} of {of}", _said(value)]
        if 0 < done < of:
            parts.append(f"{human_duration((now - self._began) / done * (of - done))} left")
        text = ", ".join(part for part in parts if part)
        bars.print(text, highlight=False, markup=False, soft_wrap=True)


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
