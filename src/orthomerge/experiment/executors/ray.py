"""The same jobs on a Ray cluster, the output folder on storage that its machines share."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError
from orthomerge.experiment.board import Board
from orthomerge.experiment.executors.worker import told
from orthomerge.experiment.jobs import Job
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.sizes import Need
from orthomerge.experiment.workshop import Workshop
from orthomerge.io.rows import ResultRow
from orthomerge.io.units import human_size

Outcome = tuple[str, Any, list[ResultRow]]

# A worker process of Ray does one job after another; what the last one loaded may serve the next.
_kept: dict[str, tuple[Workshop, str]] = {}


class OnRay:
    """Does jobs on a Ray cluster, as many at once as the machines have room for.

    Each job asks for the processors, GPUs and memory of its kind (`resources:` in the recipe;
    memory is estimated where it is not said). A lost worker or machine costs its jobs only: they
    are handed out again. `address` is that of the cluster ("auto": the one this machine belongs to;
    None: one of this machine alone, for the length of the run).
    """

    def __init__(self, address: str | None = None) -> None:
        self._ray = _import_ray()
        self._address = address

    def carry_out(self, board: Board, workshop: Workshop) -> None:
        """Do every job.

        Raises:
            OrthomergeError: no cluster, no machine of it has what a job asks for, a job was a
                mistake, or was lost too often; jobs that are at work then are finished first.
        """
        mine = not self._ray.is_initialized()
        if mine:
            self._connect()
        try:
            self._check_room(board, workshop.keys.needs)
            _Work(self._ray, board, workshop).carry_out()
        finally:
            if mine:
                self._ray.shutdown()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {} if self._address else {"include_dashboard": False}
        try:
            _knock(self._address)
            self._ray.init(
                address=self._address, log_to_driver=False, logging_level="ERROR", **local
            )
        except (OSError, RuntimeError, ValueError) as problem:
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise OrthomergeError(
                f"no Ray cluster at '{self._address}' ({reason.rstrip('.')}): start one with "
                "'ray start --head', or leave --address out to use this machine alone."
            ) from problem

    def _check_room(self, board: Board, needs: dict[str, Need]) -> None:
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for kind in dict.fromkeys(job.kind for job in board.todo()):
            need = needs[kind]
            asked = {"CPU": need.cpus, "GPU": need.gpus, "memory": need.memory}
            if not any(all(m.get(k, 0) >= v for k, v in asked.items()) for m in machines):
                raise OrthomergeError(
                    f"no machine of the Ray cluster has what a job of kind '{kind}' asks for "
                    f"({need.cpus:g} CPUs, {need.gpus:g} GPUs, {human_size(need.memory)}): add "
                    f"one, or ask for less under 'resources: {{{kind}: ...}}' in the recipe."
                )


class _Work:
    """One carrying out: the jobs on the cluster and the first failure."""

    def __init__(self, ray: Any, board: Board, workshop: Workshop) -> None:
        self._ray, self._board = ray, board
        keys = workshop.keys
        self._needs = keys.needs
        self._place = ray.put((keys.recipe, str(keys.output.resolve()), str(Path.cwd())))
        self._do = ray.remote(max_retries=0)(_do)
        self._at_work: dict[Any, tuple[Job, int]] = {}
        self._failure: Exception | None = None

    def carry_out(self) -> None:
        while True:
            if self._failure is None:
                for job in self._board.ready():
                    self._submit(job)
            if not self._at_work:
                break
            done, _ = self._ray.wait(list(self._at_work), num_returns=1)
            for reference in done:
                self._collect(reference)
        if self._failure is not None:
            raise self._failure

    def _submit(self, job: Job) -> None:
        need = self._needs[job.kind]
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "memory": need.memory}
        taken = {number for _, number in self._at_work.values()}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        self._board.began(job, "ray")
        reference = self._do.options(name=job.id, **options).remote(self._place, job)
        self._at_work[reference] = job, number
        self._board.reporter.stage(job.title, number)

    def _collect(self, reference: Any) -> None:
        job, number = self._at_work.pop(reference)
        self._board.reporter.idle(number)
        rows: list[ResultRow] = []
        try:
            event, value, rows = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as problem:
            event, value = "broke", str(problem)
        except self._ray.exceptions.RayError as problem:
            event, value = "lost", f"its Ray worker was lost: {type(problem).__name__}"
        try:
            for row in rows:
                self._board.row(row)
            self._board.ended(job, event, value)
        except (OrthomergeError, RuntimeError) as problem:
            self._failure = self._failure or problem


def _do(place: tuple[Recipe, str, str], job: Job) -> Outcome:
    """One job in a worker process of Ray, from files to files and rows."""
    recipe, output, folder = place
    rows: list[ResultRow] = []
    try:
        if Path(folder).is_dir():
            os.chdir(folder)  # the recipe's own paths are relative to where it was started
        workshop, kind = _kept.get(output, (None, ""))
        if workshop is None or workshop.keys.recipe != recipe:
            _kept.clear()
            workshop = Workshop.at(recipe, output)
        elif kind != job.kind:
            workshop.release()
        _kept[output] = workshop, job.kind
        return "done", workshop.perform(job, rows.append), rows
    except Exception as problem:
        return *told(problem, output), rows


def _knock(address: str | None) -> None:
    """Find out at once that nobody is there; Ray itself would try for minutes.

    Raises:
        OSError: nobody listens at `host:port`.
    """
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions  # pyright: ignore[reportUnusedImport]
    except ImportError as problem:
        raise OrthomergeError(
            "--executor ray needs Ray: pip install 'orthomerge[ray]', on every machine of the "
            "cluster."
        ) from problem
    return ray
