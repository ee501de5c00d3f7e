"""Several steps at once in worker processes of this machine, within a budget of memory."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil
import torch

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.executors.contract import Crew, Outcome, attempt, failure
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.progress import Reporter
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.schedule import Schedule
from orthomerge.experiment.steps import Step
from orthomerge.experiment.workspace import Workspace
from orthomerge.io.units import human_size


class ProcessExecutor:
    """Does up to `jobs` steps at once in processes of their own.

    A step begins when its estimated peak fits beside those at work into `memory` bytes (default:
    what is free now). Where there are GPUs, each worker has one. A worker that dies costs its step
    only: a new one takes its place and the step is handed out again.
    """

    def __init__(self, jobs: int, memory: int | None = None) -> None:
        self._jobs = jobs
        self._memory = memory or psutil.virtual_memory().available

    def carry_out(self, schedule: Schedule, space: Workspace) -> None:
        """Do every step.

        Raises:
            OrthomergeError: a step is estimated to need more than the budget, was a mistake, or its
                worker died too often; steps that are at work then are finished first.
        """
        crew = _Workers(schedule, space, self._jobs, self._memory)
        try:
            crew.work()
        finally:
            crew.end()


class _Setting(NamedTuple):
    """What a worker works on: recipe and folder, its threads, and its GPU if any."""

    recipe: Recipe
    output: str
    threads: int
    gpu: int | None


class _Worker:
    """One worker process: a pool of one, so that a death is known to be its own.

    What it says while it works comes over a pipe, how a step ended through the pool.
    """

    def __init__(self, number: int, setting: _Setting, events: queue.SimpleQueue[Any]) -> None:
        self.number, self._events = number, events
        self.step: Step | None = None
        self.last_kind = ""
        context = multiprocessing.get_context("spawn")
        line, theirs = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_begin, initargs=(setting, theirs)
        )
        before = set(multiprocessing.active_children())
        self._pool.submit(os.getpid)  # the first submission starts the process
        (self.process,) = set(multiprocessing.active_children()) - before
        theirs.close()
        threading.Thread(target=self._listen, args=(line,), daemon=True).start()

    def give(self, step: Step) -> None:
        """Have a step done; how it ended comes as an event."""
        self.step, self.last_kind = step, step.kind
        try:
            future = self._pool.submit(_do, step)
        except BrokenProcessPool:  # it died while it had nothing to do
            self._events.put((self, "ended", self._lost()))
        else:
            future.add_done_callback(self._ended)

    def rest(self) -> None:
        """Have it free what it keeps loaded."""
        self.last_kind = ""
        try:
            self._pool.submit(_release)
        except BrokenProcessPool:
            return  # found when it is handed a step

    def end(self) -> None:
        """Let the process go; one that is at work is not waited for."""
        if self.step is not None:
            self.process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def _listen(self, line: Connection) -> None:
        while True:
            try:
                event, value = line.recv()
            except (EOFError, OSError):
                return
            self._events.put((self, event, value))

    def _ended(self, future: Future[Outcome]) -> None:
        if future.cancelled():
            return
        problem = future.exception()
        outcome = future.result() if problem is None else self._lost()
        self._events.put((self, "ended", outcome))

    def _lost(self) -> Outcome:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"status {code}"
        return Outcome("lost", f"its process ended with {how}", [])


class _Workers(Crew):
    """One carrying out: the workers and what they are at."""

    def __init__(self, schedule: Schedule, space: Workspace, jobs: int, memory: int) -> None:
        super().__init__(schedule, space)
        self._jobs, self._memory = jobs, memory
        self._workers: dict[int, _Worker] = {}
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def hand_out(self) -> None:
        for step in self.schedule.ready():
            if len(self._at_work()) == self._jobs:
                break
            need = self.exp.need(step).memory
            if need > self._memory:
                raise OrthomergeError(
                    f"a job of kind '{step.kind}' is estimated to need {human_size(need)}, the "
                    f"budget is {human_size(self._memory)}: raise --memory, or say what it needs "
                    f"under 'resources: {{{step.kind}: {{memory: ...}}}}' in the recipe."
                )
            if sum(self.exp.need(s).memory for s in self._at_work()) + need <= self._memory:
                self._give(step)
        for worker in self._workers.values():
            if worker.step is None and worker.last_kind:
                self.schedule.reporter.idle(worker.number)
                worker.rest()

    def _give(self, step: Step) -> None:
        """Hand a step to a free worker, rather to one that has what this kind of step loads."""
        free = [w for w in self._workers.values() if w.step is None]
        free.sort(key=lambda w: (w.last_kind != step.kind, w.number))
        worker = free[0] if free else self._hire()
        self.schedule.began(step, f"worker {worker.number}, process {worker.process.pid}")
        worker.give(step)

    def _hire(self) -> _Worker:
        number = next(n for n in range(self._jobs) if n not in self._workers)
        gpus = torch.cuda.device_count()
        setting = _Setting(
            self.exp.recipe,
            str(self.exp.output),
            _threads(self._jobs),
            number % gpus if gpus else None,
        )
        self._workers[number] = worker = _Worker(number, setting, self._events)
        return worker

    def _at_work(self) -> list[Step]:
        return [w.step for w in self._workers.values() if w.step is not None]

    def is_busy(self) -> bool:
        return bool(self._at_work())

    def collect(self) -> None:
        worker, event, value = self._events.get()
        if worker.step is None:
            return  # said on the way to an end that was heard of already
        if event == "stage":
            self.schedule.reporter.stage(value, worker.number)
        elif event == "step":
            done, of = value
            self.schedule.reporter.step(done, of, worker.number)
        elif event == "row":
            self.attempt(self.schedule.row, value)
        else:
            step, worker.step = worker.step, None
            if value.event == "lost" and worker.process.exitcode is not None:
                del self._workers[worker.number]
                worker.end()
                self.schedule.reporter.idle(worker.number)
            self.ended(step, value)

    def end(self) -> None:
        """Let every worker go."""
        for worker in self._workers.values():
            worker.end()


def _threads(jobs: int) -> int:
    """Threads of each worker: what OMP_NUM_THREADS says, else its share of the processors."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    return max(1, (os.cpu_count() or 1) // jobs)


# In the worker process --------------------------------------------------------------------------


class _Sent(Reporter):
    """A reporter that sends what it is given to the driver."""

    def __init__(self, line: Connection) -> None:
        self.line = line

    def stage(self, description: str, worker: int = 0) -> None:
        """A unit of work begins."""
        self.line.send(("stage", description))

    def step(self, done: int, of: int, worker: int = 0) -> None:
        """How far the step is."""
        self.line.send(("step", (done, of)))


_here: dict[str, Any] = {}
"""The worker's setting, its line to the driver and, once it is at work, its workspace."""


def _begin(setting: _Setting, line: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its workers itself
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    if setting.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(setting.gpu)
    torch.set_num_threads(setting.threads)
    _here.update(setting=setting, line=line)


def _do(step: Step) -> Outcome:
    """Do a step; its rows are sent at once, so that they are kept whatever happens next."""
    setting, line = _here["setting"], _here["line"]
    try:
        if "space" not in _here:
            exp = Experiment(setting.recipe, setting.output)
            _here["space"] = Workspace(exp, _Sent(line))
    except Exception as problem:
        return failure(problem, setting.output, [])
    return attempt(_here["space"], step, lambda row: line.send(("row", row)))


def _release() -> None:
    if "space" in _here:
        _here["space"].release()


def _end_with_the_driver() -> None:
    """No worker outlives its driver: a killed run can be called again at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
