"""One worker process of the local executor: it is sent jobs and says what becomes of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.progress import Silent
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.workshop import Workshop
from orthomerge.io.files import disk_error


class Place(NamedTuple):
    """Where a worker works, in plain values: recipe and folder, processors, and its GPU if any."""

    recipe: Recipe
    output: str
    threads: int
    gpu: int | None


class _Sent(Silent):
    """A reporter that sends what it is told to the driver."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def stage(self, description: str, worker: int = 0) -> None:
        """A piece of work begins."""
        self._line.send(("stage", description))

    def step(self, done: int, of: int, worker: int = 0) -> None:
        """Where the piece stands."""
        self._line.send(("step", (done, of)))


def serve(line: Connection, place: Place) -> None:
    """Do the jobs that come over `line` until the driver hangs up.

    None in place of a job frees what is kept loaded. Answers are ("stage", text), ("step", two
    numbers), ("row", row), and at the end of a job ("done", costs) or what `told` says.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its workers itself
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place.gpu)
    torch.set_num_threads(place.threads)
    workshop = Workshop.at(place.recipe, Path(place.output), _Sent(line))
    while True:
        try:
            job = line.recv()
        except EOFError:
            return
        if job is None:
            workshop.release()
            continue
        try:
            costs = workshop.perform(job, lambda row: line.send(("row", row)))
        except Exception as problem:
            line.send(told(problem, place.output))
        else:
            line.send(("done", costs))


def told(problem: Exception, output: str) -> tuple[str, str]:
    """What an exception under a job means: a mistake, a lack of memory, or a fault of ours."""
    if isinstance(problem, OrthomergeError):
        return "mistake", str(problem)
    said = disk_error(problem, output)
    if said is not None:
        return "mistake", str(said)
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return "lost", "it ran out of memory"
    return "broke", "".join(traceback.format_exception(problem))


def _end_with_the_driver() -> None:
    """No worker outlives its driver: a killed run can be called again at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
