"""One step after another in this process."""

from __future__ import annotations

from orthomerge.experiment.schedule import Schedule
from orthomerge.experiment.workspace import Workspace
from orthomerge.io.files import disk_error


class SerialExecutor:
    """Does steps one after another in this process, in the recipe's order."""

    def carry_out(self, schedule: Schedule, space: Workspace) -> None:
        """Do every step; the first that fails ends the run."""
        while ready := schedule.ready():
            step = ready[0]
            schedule.began(step)
            try:
                costs = space.perform(step, schedule.row)
            except Exception as problem:
                said = disk_error(problem, space.exp.output)
                if said is not None:
                    raise said from problem
                raise
            schedule.done(step, costs)
