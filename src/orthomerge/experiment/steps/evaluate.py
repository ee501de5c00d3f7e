"""One task under its own adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthomerge.adapters import read_adapter
from orthomerge.experiment.steps.adapters import AdapterStep
from orthomerge.experiment.steps.scoring import Scoring
from orthomerge.experiment.steps.step import Cost
from orthomerge.io.rows import ResultRow

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace


@dataclass(frozen=True)
class EvaluateStep(Scoring):
    """Score a task under its own adapter: what a merge is compared with."""

    kind = "eval"
    task: str

    def title(self, exp: Experiment) -> str:
        """The step in words."""
        return f"evaluate {self.arm} · {self.task} · own adapter"

    def name(self, exp: Experiment) -> str:
        """Arm, seed, task and the row's key."""
        (key,) = exp.row_keys(self).values()
        return f"eval/{self.arm}/seed{self.seed}/{self.task}-{self.split}-{key[:12]}"

    def tasks(self, exp: Experiment) -> list[str]:
        """The one task."""
        return [self.task]

    def needs(self, exp: Experiment) -> Sequence[AdapterStep]:
        """The adapter."""
        return list(self.adapters(exp).values())

    def cost(self, exp: Experiment) -> Cost:
        """A pass for each row."""
        size = exp.size(exp.recipe.adapter_of(self.arm).targets)
        return Cost({"eval": self.score_work(exp)}, 0, self.score_memory(exp, size))

    def run(self, space: Workspace, emit: Callable[[ResultRow], None]) -> None:
        """Score it."""
        (made,) = self.needs(space.exp)
        adapter = read_adapter(space.get(made))
        space.reporter.stage(self.title(space.exp))
        emit(self.row(space, self.task, adapter.layers, adapter.modules))
