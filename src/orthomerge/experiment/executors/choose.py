"""The executors by name."""

from __future__ import annotations

from orthomerge.errors import RecipeError, unknown_name
from orthomerge.experiment.executors import Executor
from orthomerge.experiment.executors.here import Here
from orthomerge.experiment.executors.local import Local
from orthomerge.experiment.executors.ray import OnRay

EXECUTORS = ("local", "ray")


def choose_executor(
    name: str, *, jobs: int = 1, memory: int | None = None, address: str | None = None
) -> Executor:
    """The executor called `name`: "local" with one job at a time stays in this process.

    Raises:
        UnknownNameError: no such executor.
        RecipeError: a setting that belongs to the other one.
        OrthomergeError: Ray is asked for and not installed.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    if name == "ray":
        if jobs != 1 or memory is not None:
            raise RecipeError(
                "--jobs and --memory are for --executor local: Ray does as many jobs at once as "
                "the cluster has room for ('resources:' in the recipe says what each takes)."
            )
        return OnRay(address)
    if address is not None:
        raise RecipeError("--address is for --executor ray: add it, or leave the address out.")
    return Here() if jobs == 1 and memory is None else Local(jobs, memory)
