"""Where the steps of a run are done: one executor a file, behind one small contract."""

from __future__ import annotations

from orthomerge.errors import RecipeError, unknown_name
from orthomerge.experiment.executors.contract import Executor
from orthomerge.experiment.executors.process import ProcessExecutor
from orthomerge.experiment.executors.ray import RayExecutor
from orthomerge.experiment.executors.serial import SerialExecutor

EXECUTORS = ("serial", "process", "ray")

__all__ = [
    "EXECUTORS",
    "Executor",
    "ProcessExecutor",
    "RayExecutor",
    "SerialExecutor",
    "choose_executor",
]


def choose_executor(
    name: str | None = None,
    *,
    jobs: int = 1,
    memory: int | None = None,
    address: str | None = None,
) -> Executor:
    """The executor called `name`; by default "process" for several jobs at once, else "serial".

    Raises:
        UnknownNameError: no such executor.
        RecipeError: a setting that belongs to another one.
        OrthomergeError: Ray is asked for and not installed.
    """
    if name is None:
        name = "serial" if jobs == 1 and memory is None else "process"
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    if name != "process" and (jobs != 1 or memory is not None):
        room = " Ray does as many at once as the cluster has room for ('resources:' in the recipe)."
        raise RecipeError(
            f"--jobs and --memory are for --executor process, not {name}: leave them out."
            + (room if name == "ray" else "")
        )
    if name != "ray" and address is not None:
        raise RecipeError("--address is for --executor ray: add it, or leave the address out.")
    if name == "ray":
        return RayExecutor(address)
    return SerialExecutor() if name == "serial" else ProcessExecutor(jobs, memory)
