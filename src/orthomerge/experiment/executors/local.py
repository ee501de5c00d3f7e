"""Jobs side by side in worker processes of this machine, within a budget of memory."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
import torch

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.board import Board
from orthomerge.experiment.executors.worker import Place, serve
from orthomerge.experiment.jobs import Job
from orthomerge.experiment.sizes import Need
from orthomerge.experiment.workshop import Workshop
from orthomerge.io.units import human_size


class _Worker:
    """The driver's end of a worker process."""

    def __init__(self, number: int, place: Place) -> None:
        self.number = number
        self.job: Job | None = None
        self.last_kind = ""
        context = multiprocessing.get_context("spawn")
        self.line: Connection
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, place), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """Hang up; a worker that is at work is not waited for."""
        self.line.close()
        if self.job is not None:
            self.process.terminate()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Local:
    """Does up to `jobs` jobs at once in processes of their own.

    A job begins when its estimated peak fits beside those at work into `memory` bytes (default:
    what is free now). Where there are GPUs, each worker has one. A worker that dies costs its job
    only: a new one takes its place and the job is handed out again.
    """

    def __init__(self, jobs: int, memory: int | None = None) -> None:
        self._jobs = jobs
        self._memory = memory or psutil.virtual_memory().available

    def carry_out(self, board: Board, workshop: Workshop) -> None:
        """Do every job.

        Raises:
            OrthomergeError: a job is estimated to need more than the budget, was a mistake, or its
                worker died too often; jobs that are at work then are finished first.
        """
        work = _Work(board, workshop, self._jobs, self._memory)
        try:
            work.carry_out()
        finally:
            work.end()


class _Work:
    """One carrying out: its workers, what they are at, and the first failure."""

    def __init__(self, board: Board, workshop: Workshop, jobs: int, memory: int) -> None:
        self._board, self._workshop = board, workshop
        self._jobs, self._memory = jobs, memory
        self._needs: dict[str, Need] = workshop.keys.needs
        self._workers: dict[int, _Worker] = {}
        self._failure: Exception | None = None

    def carry_out(self) -> None:
        while True:
            if self._failure is None:
                self._hand_out()
            if not self._busy():
                break
            self._listen()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        for worker in self._workers.values():
            worker.end()

    def _busy(self) -> list[_Worker]:
        return [w for w in self._workers.values() if w.job is not None]

    def _hand_out(self) -> None:
        for job in self._board.ready():
            if len(self._busy()) == self._jobs:
                break
            need = self._needs[job.kind].memory
            if need > self._memory:
                self._failure = OrthomergeError(
                    f"a job of kind '{job.kind}' is estimated to need {human_size(need)}, the "
                    f"budget is {human_size(self._memory)}: raise --memory, or say what it needs "
                    f"under 'resources: {{{job.kind}: {{memory: ...}}}}' in the recipe."
                )
                return
            at_work = sum(self._needs[w.job.kind].memory for w in self._busy() if w.job)
            if at_work + need <= self._memory:
                self._give(job)
        self._rest()

    def _rest(self) -> None:
        """Have workers without a job free what they keep loaded."""
        for worker in self._workers.values():
            if worker.job is None and worker.last_kind:
                worker.last_kind = ""
                self._board.reporter.idle(worker.number)
                with suppress(OSError):  # a dead one is found when it is handed a job
                    worker.line.send(None)

    def _give(self, job: Job) -> None:
        """Hand a job to a free worker, rather to one that has what this kind of job loads."""
        free = [w for w in self._workers.values() if w.job is None]
        free.sort(key=lambda w: (w.last_kind != job.kind, w.number))
        worker = free[0] if free else self._hire()
        worker.job, worker.last_kind = job, job.kind
        self._board.began(job, f"worker {worker.number}, process {worker.process.pid}")
        try:
            worker.line.send(job)
        except OSError:
            self._died(worker)  # found dead before it could be told

    def _hire(self) -> _Worker:
        number = next(n for n in range(self._jobs) if n not in self._workers)
        gpus = torch.cuda.device_count()
        place = Place(
            self._workshop.keys.recipe,
            str(self._workshop.keys.output),
            _threads(self._jobs),
            number % gpus if gpus else None,
        )
        self._workers[number] = worker = _Worker(number, place)
        return worker

    def _listen(self) -> None:
        lines = {worker.line: worker for worker in self._busy()}
        for line in wait(list(lines)):
            assert isinstance(line, Connection)
            worker = lines[line]
            try:
                event, value = line.recv()
            except (EOFError, OSError):
                self._died(worker)
            else:
                self._heard(worker, event, value)

    def _heard(self, worker: _Worker, event: str, value: Any) -> None:
        job, reporter = worker.job, self._board.reporter
        assert job is not None
        if event == "stage":
            reporter.stage(value, worker.number)
        elif event == "step":
            done, of = value
            reporter.step(done, of, worker.number)
        elif event == "row":
            self._attempt(self._board.row, value)
        else:
            worker.job = None
            self._attempt(self._board.ended, job, event, value)

    def _died(self, worker: _Worker) -> None:
        job, worker.job = worker.job, None
        assert job is not None
        del self._workers[worker.number]
        worker.end()
        self._board.reporter.idle(worker.number)
        code = worker.process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"status {code}"
        self._attempt(self._board.lost, job, f"its process ended with {how}")

    def _attempt(self, tell: Callable[..., None], *what: Any) -> None:
        """Tell the board; the first failure is kept, and ends the run once nobody is at work."""
        try:
            tell(*what)
        except (OrthomergeError, RuntimeError) as problem:
            self._failure = self._failure or problem


def _threads(jobs: int) -> int:
    """Threads of each worker: what OMP_NUM_THREADS says, else its share of the processors."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    return max(1, (os.cpu_count() or 1) // jobs)
