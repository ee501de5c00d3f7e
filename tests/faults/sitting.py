"""One sitting of a run in a forked process, and how it ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ending import ending_of
from injection import disk

from orthomerge.experiment import Run, parse_recipe
from orthomerge.experiment.progress import Reporter

TERMINATED = 128 + signal.SIGTERM


class Outcome(NamedTuple):
    """The exit status (minus the signal), what was said, and whether the fault came to be."""

    code: int
    said: str
    fired: bool


class _Tells(Reporter):
    def __init__(self, line: int) -> None:
        self._line = line

    def stage(self, description: str, worker: int = 0) -> None:
        os.write(self._line, b".")


def forked(
    recipe: dict[str, Any],
    folder: Path,
    before: Callable[[], None] | None = None,
    *,
    during: Callable[[int], bool] | None = None,
) -> Outcome:
    """A sitting to its end. `before` is called in its process; `during` here, once it is at work,
    with its number, and says whether the fault was done.
    """
    heard, told = os.pipe()
    said = folder.with_name(folder.name + ".said")
    said.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.close(heard)
        _sit(recipe, folder, before, told, said)
    os.close(told)
    fired = False
    if during is not None:
        os.read(heard, 1)  # work has begun, or it has ended
        fired = during(child)
    _, status = os.waitpid(child, 0)
    os.close(heard)
    text = said.read_text(encoding="utf-8") if said.exists() else ""
    mark, _, text = text.partition("\n")
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Outcome(code, text, fired or mark == "fired" or code < 0)


def _sit(recipe, folder: Path, before, told: int, said: Path) -> None:
    def run() -> str:
        if before is not None:
            before()
        Run(parse_recipe(recipe), folder, reporter=_Tells(told)).execute()
        return ""

    code, text = ending_of(run)
    try:
        fired, disk.root = disk.fired, ""
        said.write_text(f"{'fired' if fired else ''}\n{text}", encoding="utf-8")
    finally:
        os._exit(code)


def after(seconds: float) -> Callable[[int], bool]:
    """A kill so long after the work has begun."""

    def strike(child: int) -> bool:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return False  # a killed process shows it

    return strike
