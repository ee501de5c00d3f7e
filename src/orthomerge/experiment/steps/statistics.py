"""Second moments of one task's layer inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orthomerge.experiment.sizes import STATISTICS_BATCH
from orthomerge.experiment.steps.step import VERSION, Artifact, Cost
from orthomerge.io.files import fingerprint, slug
from orthomerge.merging import get_method
from orthomerge.models.loading import tokenizer_hash
from orthomerge.statistics import SUFFIX, Statistics, collect_statistics

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace

# How the statistics are collected that merging methods and the run's analyses ask for.
MERGE_GRANULARITY = "token"


@dataclass(frozen=True)
class StatisticsStep(Artifact[Statistics]):
    """Collect a task's statistics at the inputs of the layers that `targets` name."""

    kind = stage = "stats"
    task: str
    granularity: str
    samples: int
    targets: tuple[str, ...]

    @classmethod
    def for_arm(cls, exp: Experiment, arm: str) -> dict[str, StatisticsStep]:
        """The statistics of every task that an arm's start, constraint or conversion looks at."""
        part = exp.recipe.arms[arm]
        samples, targets = part.samples or exp.recipe.statistics.samples, _targets(exp, arm)
        return {t: cls(t, part.granularity, samples, targets) for t in exp.tasks_of(arm)}

    @classmethod
    def for_merging(cls, exp: Experiment, arm: str | None = None) -> dict[str, StatisticsStep]:
        """The statistics of every task of an arm, or of all, that merging methods read."""
        tasks = exp.tasks_of(arm) if arm else exp.tasks
        samples, targets = exp.recipe.statistics.samples, _targets(exp, arm)
        return {t: cls(t, MERGE_GRANULARITY, samples, targets) for t in tasks}

    @classmethod
    def for_method(cls, exp: Experiment, arm: str, method: str) -> list[StatisticsStep]:
        """The statistics that a merging method reads; none where it needs none."""
        needed = "moments" in get_method(method).needs
        return list(cls.for_merging(exp, arm).values()) if needed else []

    def title(self, exp: Experiment) -> str:
        """The step in words."""
        return f"statistics of {self.task} ({self.granularity})"

    def key(self, exp: Experiment) -> str:
        """The hash of base, rows, sample and layers."""
        return fingerprint(
            {
                "piece": ["statistics", VERSION],
                "base": exp.base.sha256,
                "data": exp.data[self.task].fingerprint,
                "statistics": exp.recipe.statistics.model_dump() | {"samples": self.samples},
                "max_length": exp.recipe.data.max_length,
                "targets": sorted(self.targets),
                "granularity": self.granularity,
            }
            | exp.recipe.training.model_dump(include={"precision"}, exclude_defaults=True)
            | exp.words(self.task)
        )

    def path(self, exp: Experiment) -> Path:
        """A file under `stats/`."""
        name = f"{slug(self.task)}-{self.granularity}-{exp.key(self)[:12]}{SUFFIX}"
        return exp.output / "stats" / name

    def needs(self, exp: Experiment) -> Sequence[Artifact[object]]:
        """Nothing."""
        return ()

    def cost(self, exp: Experiment) -> Cost:
        """A pass over the sample; moments at their fullest, of which a file holds the triangle."""
        size, length = exp.size(self.targets), exp.recipe.data.max_length
        products = sum(2 * d * d for d in size.inputs)
        work = self.samples * length * (2 * (size.multiplied - size.output) + products)
        moments = size.moments()
        forward = size.activations(STATISTICS_BATCH, length) // max(size.depth, 1)
        return Cost({"stats": float(work)}, moments // 2, size.weights + forward + moments)

    def read(self, space: Workspace, path: Path) -> Statistics:
        """The file, whole."""
        return Statistics.load(path)

    def make(self, space: Workspace, path: Path) -> None:
        """Collect over the sample with the base model that the process keeps loaded."""
        exp, done = space.exp, 0
        sample, prompt = space.sample(self.task, self.samples), exp.prompts.get(self.task)

        def count(size: int) -> None:
            nonlocal done
            done += size
            space.reporter.step(done, len(sample))

        collect_statistics(
            space.backbone,
            space.batches(self.task, sample),
            self.targets,
            granularity=self.granularity,
            task=self.task,
            model_id=exp.base.name,
            model_sha256=exp.base.sha256,
            tokenizer_hash=tokenizer_hash(exp.tokenizer),
            prompt=prompt.fingerprint if prompt else None,
            progress=count,
        ).save(path)


def _targets(exp: Experiment, arm: str | None) -> tuple[str, ...]:
    own = exp.recipe.arms[arm].targets if arm else None
    return tuple(own or exp.recipe.adapter.targets)
