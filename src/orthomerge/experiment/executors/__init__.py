"""Where the jobs of a run are done: one executor a file, behind one small contract."""

from __future__ import annotations

from typing import Protocol

from orthomerge.experiment.board import Board
from orthomerge.experiment.workshop import Workshop


class Executor(Protocol):
    """Carries out the jobs of a board until there is none left.

    It takes jobs from `board.ready()`, tells `board.began`, hands every row to `board.row` and ends
    a job with `board.done`, or with `board.lost` where its worker died. Work in this process is
    done by `workshop`; another process makes one of its own from the same recipe and folder.
    """

    def carry_out(self, board: Board, workshop: Workshop) -> None:
        """Do every job, in an order that keeps to what jobs need."""
        ...
