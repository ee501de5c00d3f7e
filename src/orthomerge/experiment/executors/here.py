"""One job after another in this process."""

from __future__ import annotations

from orthomerge.experiment.board import Board
from orthomerge.experiment.workshop import Workshop
from orthomerge.io.files import disk_error


class Here:
    """Does jobs one after another in this process, in the recipe's order."""

    def carry_out(self, board: Board, workshop: Workshop) -> None:
        """Do every job; the first that fails ends the run."""
        while ready := board.ready():
            job = ready[0]
            board.began(job)
            try:
                costs = workshop.perform(job, board.row)
            except Exception as problem:
                said = disk_error(problem, workshop.keys.output)
                if said is not None:
                    raise said from problem
                raise
            board.done(job, costs)
