"""The same steps on a Ray cluster, the output folder on storage that its machines share."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError, reason
from orthomerge.experiment.executors.contract import Crew, Outcome, attempt, failure
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.schedule import Schedule
from orthomerge.experiment.steps import Step
from orthomerge.experiment.workspace import Workspace
from orthomerge.io.units import human_size

# A worker process of Ray does one step after another; what the last one loaded may serve the next.
_kept: dict[str, tuple[Workspace, str]] = {}


class RayExecutor:
    """Does steps on a Ray cluster, as many at once as the machines have room for.

    Each step asks for the processors, GPUs and memory of its kind (`resources:` in the recipe;
    memory is estimated where it is not said). A lost worker or machine costs its steps only: they
    are handed out again. `address` is that of the cluster ("auto": the one this machine belongs to;
    None: one of this machine alone, for the length of the run).
    """

    def __init__(self, address: str | None = None) -> None:
        self._ray = _import_ray()
        self._address = address

    def carry_out(self, schedule: Schedule, space: Workspace) -> None:
        """Do every step.

        Raises:
            OrthomergeError: no cluster, no machine of it has what a step asks for, a step was a
                mistake, or was lost too often; steps that are at work then are finished first.
        """
        mine = not self._ray.is_initialized()
        if mine:
            self._connect()
        try:
            self._check_room(schedule)
            _Workers(self._ray, schedule, space).work()
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
            raise OrthomergeError(
                f"no Ray cluster at '{self._address}' ({reason(problem)}): start one with "
                "'ray start --head', or leave --address out to use this machine alone."
            ) from problem

    def _check_room(self, schedule: Schedule) -> None:
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for kind, need in dict.fromkeys((s.kind, schedule.exp.need(s)) for s in schedule.open()):
            asked = {"CPU": need.cpus, "GPU": need.gpus, "memory": need.memory}
            if not any(all(m.get(k, 0) >= v for k, v in asked.items()) for m in machines):
                raise OrthomergeError(
                    f"no machine of the Ray cluster has what a job of kind '{kind}' asks for "
                    f"({need.cpus:g} CPUs, {need.gpus:g} GPUs, {human_size(need.memory)}): add "
                    f"one, or ask for less under 'resources: {{{kind}: ...}}' in the recipe."
                )


class _Workers(Crew):
    """One carrying out: the steps on the cluster."""

    def __init__(self, ray: Any, schedule: Schedule, space: Workspace) -> None:
        super().__init__(schedule, space)
        self._ray = ray
        folder = str(self.exp.output.resolve())
        self._setting = ray.put((self.exp.recipe, folder, str(Path.cwd())))
        self._do = ray.remote(max_retries=0)(_do)
        self._at_work: dict[Any, tuple[Step, int]] = {}

    def is_busy(self) -> bool:
        return bool(self._at_work)

    def hand_out(self) -> None:
        for step in self.schedule.ready():
            need = self.exp.need(step)
            options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "memory": need.memory}
            taken = {number for _, number in self._at_work.values()}
            number = next(n for n in range(len(taken) + 1) if n not in taken)
            self.schedule.began(step, "ray")
            name = step.name(self.exp)
            reference = self._do.options(name=name, **options).remote(self._setting, step)
            self._at_work[reference] = step, number
            self.schedule.reporter.stage(step.title(self.exp), number)

    def collect(self) -> None:
        done, _ = self._ray.wait(list(self._at_work), num_returns=1)
        for reference in done:
            step, number = self._at_work.pop(reference)
            self.schedule.reporter.idle(number)
            self.ended(step, self._outcome(reference))

    def _outcome(self, reference: Any) -> Outcome:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as problem:
            return Outcome("broke", str(problem), [])
        except self._ray.exceptions.RayError as problem:
            return Outcome("lost", f"its Ray worker was lost: {type(problem).__name__}", [])


def _do(setting: tuple[Recipe, str, str], step: Step) -> Outcome:
    """One step in a worker process of Ray, from files to files and rows."""
    recipe, output, folder = setting
    try:
        if Path(folder).is_dir():
            os.chdir(folder)  # the recipe's own paths are relative to where it was started
        space, kind = _kept.get(output, (None, ""))
        if space is None or space.exp.recipe != recipe:
            _kept.clear()
            space = Workspace(Experiment(recipe, output))
        elif kind != step.kind:
            space.release()
        _kept[output] = space, step.kind
    except Exception as problem:
        return failure(problem, output, [])
    return attempt(space, step, lambda row: None)


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
