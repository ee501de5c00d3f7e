"""Where jobs are done: one process with a recipe, an output folder, and what it keeps loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orthomerge.experiment.costs import Costs
from orthomerge.experiment.evidence import keep_evidence
from orthomerge.experiment.jobs import Job
from orthomerge.experiment.keys import Keys
from orthomerge.experiment.pieces import Pieces
from orthomerge.experiment.progress import Reporter, Silent
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.scores import Scores
from orthomerge.io.rows import ResultRow


class Workshop:
    """Does the jobs of one recipe, one after another; the base model stays loaded between them."""

    def __init__(self, keys: Keys, reporter: Reporter) -> None:
        self.keys, self._reporter = keys, reporter
        self.release()

    def release(self) -> None:
        """Let go of the models and statistics that are kept loaded."""
        self.pieces = Pieces(self.keys, reporter=self._reporter, costs=Costs())
        self.scores = Scores(self.pieces)

    @classmethod
    def at(cls, recipe: Recipe, output: str | Path, reporter: Reporter | None = None) -> Workshop:
        """A workshop of its own, as another process has it."""
        return cls(Keys(recipe, Path(output)), reporter or Silent())

    def perform(self, job: Job, emit: Callable[[ResultRow], None]) -> Costs:
        """Do a job: its piece is then in the output folder, or its rows were handed to `emit`.

        Returns what each stage took. A piece that is there already is left as it is.
        """
        self.pieces.costs = costs = Costs()
        if job.kind == "stats":
            self.pieces.statistics(*job.arguments)
        elif job.kind == "start":
            self.pieces.start(*job.arguments)
        elif job.kind == "train":
            self.pieces.adapter(*job.arguments)
        elif job.kind == "fisher":
            self.pieces.fisher(*job.arguments)
        elif job.kind == "eval":
            self.scores.single(job.arguments[0], emit)
        else:
            asked, missing = job.arguments
            self.scores.merged(asked, emit, missing)
        return costs

    def keep_evidence(self, rows: Sequence[ResultRow]) -> Costs:
        """Write what the page shows beside the rows (see `evidence`); returns what it took."""
        self.pieces.costs = costs = Costs()
        keep_evidence(self.pieces, rows)
        return costs
