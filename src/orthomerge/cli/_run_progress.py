"""Progress of a run: bars and the table so far at a terminal, elsewhere a line each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from orthomerge.cli._progress import bars
from orthomerge.experiment.progress import Reporter
from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.report import summary_table

# More workers than these are at work without a bar of their own.
_BARS = 12
# The table is made anew no sooner than this after the last time, in seconds.
_EVERY = 2.0


class RunProgress(Reporter):
    """The run's bar, one for the step of each worker, and the results as they come.

    `arm_tasks` says which arms have tasks of their own.
    """

    def __init__(self) -> None:
        self.arm_tasks: Mapping[str, Sequence[str]] = {}
        self._plain = not bars.is_terminal
        self._last_line = ""
        self._jobs = ""
        self._rows: dict[str, ResultRow] = {}
        self._table: RenderableType = Text("")
        self._drawn, self._seen = 0.0, 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=bars,
        )
        self._run = self._progress.add_task("[bold]whole run", total=None)
        self._steps = {0: self._progress.add_task("starting", total=None)}
        self._live = Live(
            get_renderable=self._picture, console=bars, transient=True, auto_refresh=True
        )

    def __enter__(self) -> RunProgress:
        """Begin drawing."""
        if not self._plain and not bars.quiet:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._live.stop()

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
        """A unit of work begins."""
        if worker < _BARS:
            if worker not in self._steps:
                self._steps[worker] = self._progress.add_task("", total=None)
            number = self._steps[worker]
            self._progress.reset(number, description=description, visible=True)
            # Neither reset nor update takes a total back once it is set.
            next(t for t in self._progress.tasks if t.id == number).total = None
        if self._plain and description != self._last_line:
            self._say(description)
            self._last_line = description

    def step(self, done: int, of: int, worker: int = 0) -> None:
        """How far the step is."""
        if worker in self._steps:
            self._progress.update(self._steps[worker], completed=done, total=of)

    def idle(self, worker: int) -> None:
        """Nothing to do for now: the worker's bar goes until it has a step again."""
        if worker in self._steps:
            self._progress.update(self._steps[worker], visible=False)

    def known(self, rows: Iterable[ResultRow]) -> None:
        """Results of earlier sittings."""
        self._rows |= {row.key: row for row in rows}

    def row(self, row: ResultRow) -> None:
        """A result."""
        self._rows[row.key] = row
        if self._plain:
            weight = "" if row.weight is None else f" {row.weight:g}"
            merge = "own adapter" if row.method == SINGLE else f"{row.method}{weight}"
            self._say(
                f"  {row.arm} · {row.task} · {merge}, {row.split}, seed {row.seed}: "
                f"{row.metric} {100 * row.value:.1f}"
            )

    def _say(self, text: str) -> None:
        bars.print(f"[{self._jobs}] {text}", highlight=False, markup=False, soft_wrap=True)

    def _picture(self) -> RenderableType:
        """Bars first: on a low screen it is the table's end that is cut."""
        now = time.monotonic()
        if len(self._rows) != self._seen and now - self._drawn > _EVERY:
            self._table = summary_table(list(self._rows.values()), self.arm_tasks)
            self._drawn, self._seen = now, len(self._rows)
        return Group(self._progress, self._table)
