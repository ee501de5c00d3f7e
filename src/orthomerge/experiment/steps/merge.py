"""An arm's adapters merged by one method at one weight, and every task scored under the merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters import Adapter, read_adapter, save_merged
from orthomerge.experiment.arms import Merge
from orthomerge.experiment.sizes import MERGING
from orthomerge.experiment.steps.fisher import FisherStep
from orthomerge.experiment.steps.scoring import Scoring
from orthomerge.experiment.steps.statistics import StatisticsStep
from orthomerge.experiment.steps.step import VERSION, Artifact, Cost, Rows
from orthomerge.io.files import fingerprint
from orthomerge.io.rows import ResultRow
from orthomerge.merging import MergeConfig, MergedUpdate, get_method, merge_layers

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.recipe import AnyMerge
    from orthomerge.experiment.workspace import Workspace


@dataclass(frozen=True)
class MergeStep(Scoring):
    """Merge, keep the merge where the recipe says so, and score it.

    `place` is the merge's in the recipe's list. `only` are the tasks still to be scored, None for
    all: it is no part of what the step is.
    """

    kind = "merge"
    place: int
    weight: float | None
    only: tuple[str, ...] | None = field(default=None, compare=False)

    def title(self, exp: Experiment) -> str:
        """The step in words."""
        return f"merge {self.arm} · {self.merge(exp)[0].method} · weight {said(self.weight)}"

    def merge(self, exp: Experiment) -> tuple[AnyMerge, float | None]:
        """The recipe's merge and its weight."""
        return exp.recipe.merges[self.place], self.weight

    def _how(self, exp: Experiment) -> Merge:
        merge = exp.recipe.merges[self.place]
        assert isinstance(merge, Merge)
        return merge

    def name(self, exp: Experiment) -> str:
        """Arm, seed, method, weight and a hash of the rows' keys."""
        what = f"{self.merge(exp)[0].method}-w{said(self.weight)}-{self.split}"
        return f"merge/{self.arm}/seed{self.seed}/{what}-{exp.key(self)[:12]}"

    def tasks(self, exp: Experiment) -> list[str]:
        """All of the arm."""
        return exp.tasks_of(self.arm)

    def depends(self, exp: Experiment) -> dict[str, Any]:
        """Method, weight, options, and what the method reads besides the adapters."""
        merge = self._how(exp)
        what: list[Any] = [merge.method, self.weight, merge.options, merge.rank]
        if merge.energy is not None:
            what.append({"energy": merge.energy})
        if merge.seed is not None:
            what.append({"seed": merge.seed})
        found: dict[str, Any] = {"merge": what}
        if statistics := self._statistics(exp):
            found["statistics"] = [exp.key(step) for step in statistics]
        if self._fisher(exp):
            found["fisher"] = exp.recipe.statistics.model_dump()
        return found

    def _statistics(self, exp: Experiment) -> list[StatisticsStep]:
        return StatisticsStep.for_method(exp, self.arm, self._how(exp).method)

    def _fisher(self, exp: Experiment) -> list[FisherStep]:
        method = self._how(exp).method
        return FisherStep.for_method(exp, self.arm, self.seed, self.rate, method)

    def needs(self, exp: Experiment) -> Sequence[Artifact[Any]]:
        """The adapters, and every task's statistics or Fisher information for some methods."""
        return [*self.adapters(exp).values(), *self._statistics(exp), *self._fisher(exp)]

    def folder(self, exp: Experiment) -> Path:
        """Where the merged adapter is, where it is kept."""
        merge = self._how(exp)
        adapters = [exp.key(step) for step in self.adapters(exp).values()]
        later = {name for name in ("energy", "seed") if getattr(merge, name) is None}
        what = merge.model_dump(exclude={"weights", "choose_from", *later})
        key = fingerprint([adapters, what, self.weight, VERSION])
        name = f"{merge.method}-w{said(self.weight)}-{key[:12]}"
        return exp.output / "merged" / self.arm / f"seed{self.seed}" / name

    def is_kept(self, exp: Experiment) -> bool:
        """Whether the recipe keeps the merged adapter."""
        return exp.recipe.save_merged and self.split == "test"

    def is_done(self, exp: Experiment, rows: Rows, there: Callable[[Path], bool]) -> bool:
        """Whether all rows are there, and the folder where one is kept."""
        kept = not self.is_kept(exp) or there(self.folder(exp))
        return super().is_done(exp, rows, there) and kept

    def cost(self, exp: Experiment) -> Cost:
        """All adapters and one dense update at a time, then a pass for each row of every task."""
        tasks, shape = len(self.tasks(exp)), exp.recipe.adapter_of(self.arm)
        size = exp.size(shape.targets)
        work = {
            "merge": float(MERGING * size.updates() * tasks),
            "eval": self.score_work(exp),
        }
        memory = self.score_memory(exp, size) + 4 * size.updates()
        if self._statistics(exp):
            memory += tasks * size.moments()
        if self._fisher(exp):
            memory += tasks * 4 * size.updates()
        return Cost(work, self._disk(exp) if self.is_kept(exp) else 0, memory)

    def _disk(self, exp: Experiment) -> int:
        """Bytes of the folder: layers of low rank where the method or the recipe keeps it low."""
        merge = self._how(exp)
        tasks, method = len(self.tasks(exp)), get_method(merge.method)
        shape = exp.recipe.adapter_of(self.arm)
        rank = merge.arguments.get("rank")
        if not isinstance(rank, int):
            rank = shape.rank * tasks if method.low_rank else None
        size = exp.size(shape.targets)
        return 4 * size.adapter(rank) * (1 + tasks if method.per_task else 1)

    def run(self, space: Workspace, emit: Callable[[ResultRow], None]) -> None:
        """Merge, write the folder unless it is there, and score the tasks that are missing."""
        exp = space.exp
        adapters = {t: read_adapter(space.get(s)) for t, s in self.adapters(exp).items()}
        space.reporter.stage(self.title(space.exp))
        update = self.update(space, adapters)
        if self.is_kept(exp) and not self.folder(exp).is_dir():
            with space.costs.stage("merge"):
                self._save(exp, update, adapters)
        for place, (task, adapter) in enumerate(adapters.items()):
            if self.only is None or task in self.only:
                emit(self.row(space, task, update.of(place), adapter.modules))

    def update(self, space: Workspace, adapters: Mapping[str, Adapter]) -> MergedUpdate:
        """The adapters, by task, merged with what the method needs besides."""
        given: dict[str, Any] = {}
        if statistics := self._statistics(space.exp):
            given["statistics"] = [space.get(step) for step in statistics]
        if fisher := self._fisher(space.exp):
            given["fisher"] = [space.get(step) for step in fisher]
        with space.costs.stage("merge"):
            return merge_layers(
                [a.layers for a in adapters.values()], self._config(space.exp), **given
            )

    def _config(self, exp: Experiment) -> MergeConfig:
        return self._how(exp).config(self.weight, self.seed)

    def _save(self, exp: Experiment, update: MergedUpdate, adapters: Mapping[str, Adapter]) -> None:
        read = list(adapters.values())
        save_merged(self.folder(exp), update, read, self._config(exp), names=list(adapters))


def said(weight: float | None) -> str:
    """A weight as names have it."""
    return "auto" if weight is None else f"{weight:g}"
