"""One task's adapter, trained from its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.experiment.sizes import TRAINING_BYTES, count_rows
from orthomerge.experiment.steps.start import StartStep, read_folder
from orthomerge.experiment.steps.statistics import StatisticsStep
from orthomerge.experiment.steps.step import VERSION, AdapterArtifact, Artifact, Cost
from orthomerge.io.files import derive_seed, fingerprint
from orthomerge.training import Charged, TrainingSettings, train_adapter

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace


@dataclass(frozen=True)
class TrainStep(AdapterArtifact):
    """Train a task's adapter at one learning rate of its arm."""

    kind = stage = "train"

    def key(self, exp: Experiment) -> str:
        """The hash of start, rows and settings."""
        training, rate_of = exp.settings(self.task)
        return fingerprint(
            {
                "piece": ["adapter", VERSION],
                "start": exp.key(self._start()),
                "data": exp.data[self.task].fingerprint,
                "max_length": exp.recipe.data.max_length,
                "training": training,
                "learning_rate": rate_of(self.rate),
                "constraint": exp.recipe.arms[self.arm].constraint,
                "seed": [self.seed, self.task],
            }
            | self._penalty(exp)
            | exp.words(self.task)
        )

    def _penalty(self, exp: Experiment) -> dict[str, Any]:
        """What the constraint "penalty" adds to the key."""
        arm = exp.recipe.arms[self.arm]
        if not (steps := self._charged(exp)):
            return {}
        keys = {task: exp.key(step) for task, step in steps.items()}
        own = keys.pop(self.task)
        found: dict[str, Any] = {"strength": arm.strength, "others": list(keys.values())}
        if arm.isotropic_share:
            found["isotropic_share"] = arm.isotropic_share
        if arm.penalty_moment != "others":
            found["moment"] = arm.penalty_moment
        if arm.penalty_moment == "pooled":
            found["own"] = own
        if arm.penalty_moment == "random":
            shared = arm.seed_policy == "shared"
            found["drawn"] = self.seed if shared else [self.seed, self.task]
        return {"penalty": found}

    def _charged(self, exp: Experiment) -> dict[str, StatisticsStep]:
        """The statistics that the constraint "penalty" charges for, by task."""
        penalty = exp.recipe.arms[self.arm].constraint == "penalty"
        return StatisticsStep.for_arm(exp, self.arm) if penalty else {}

    def _start(self) -> StartStep:
        return StartStep(self.arm, self.task, self.seed)

    def needs(self, exp: Experiment) -> Sequence[Artifact[Any]]:
        """The start, and every task's statistics for a penalty."""
        return [self._start(), *self._charged(exp).values()]

    def cost(self, exp: Experiment) -> Cost:
        """Every epoch's passes there and back; gradients and AdamW's two moments in memory."""
        epochs = exp.settings(self.task)[0]["epochs"]
        return training_cost(exp, self.arm, epochs * count_rows(exp.recipe.data.train))

    def read(self, space: Workspace, path: Path) -> Path:
        """The folder, once all of it can be read."""
        return read_folder(path, losses=True)

    def make(self, space: Workspace, path: Path) -> None:
        """Train under the arm's constraint."""
        exp, rate = space.exp, exp_rate(space.exp, self.task, self.rate)
        settings, held = training_settings(exp, self.task, self.seed, rate)
        space.free_backbone()
        train_adapter(
            space.model(self.task, self.seed),
            space.get(self._start()),
            exp.data[self.task].train,
            exp.tokenizer,
            regression=exp.head(self.task)[1],
            settings=settings,
            prompt=exp.prompts.get(self.task),
            constraint=exp.recipe.arms[self.arm].constraint,
            charged=Charged(*self._start().problem(space)) if self._charged(exp) else None,
            seed=derive_seed(held, self.task, "training"),
            output=path,
            record={
                "arm": self.arm, "task": self.task, "seed": self.seed, "rate": rate,
                "key": exp.key(self),
            },
            progress=space.reporter.step,
            report_to=exp.recipe.training.report_to,
            logs=exp.output / "logs",
            label=f"{self.arm}/seed{self.seed}/{path.name}",
        )  # fmt: skip


def exp_rate(exp: Experiment, task: str, rate: float) -> float:
    """The learning rate of a task in an arm of the given rate."""
    return exp.settings(task)[1](rate)


def training_settings(
    exp: Experiment, task: str, seed: int, rate: float, **more: Any
) -> tuple[TrainingSettings, int]:
    """The settings of a task's training, and the seed that its rows and its dropout draw under."""
    content, _ = exp.settings(task)
    held = content.pop("seed", seed)
    length = exp.recipe.data.max_length
    return TrainingSettings(**content, **more, learning_rate=rate, max_length=length), held


def training_cost(exp: Experiment, arm: str, rows: float) -> Cost:
    """What a training takes that reads so many rows, repeated ones counted each time."""
    part, shape = exp.recipe.training, exp.recipe.adapter_of(arm)
    size, length = exp.size(shape.targets), exp.recipe.data.max_length
    passes, adapter = part.batch_size // part.accumulate, size.adapter(shape.rank)
    memory = size.weights + size.activations(passes, length) + size.logits(passes, length)
    work = {"train": 4.0 * size.multiplied * length * rows}
    return Cost(work, 4 * adapter, memory + TRAINING_BYTES * adapter)
