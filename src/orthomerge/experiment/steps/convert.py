"""One task's adapter of another arm, converted after its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters import OLD_NAMES, convert_adapters
from orthomerge.experiment.sizes import DECOMPOSITION
from orthomerge.experiment.steps.start import read_folder
from orthomerge.experiment.steps.statistics import StatisticsStep
from orthomerge.experiment.steps.step import VERSION, AdapterArtifact, Artifact, Cost
from orthomerge.experiment.steps.train import (
    TrainStep,
    exp_rate,
    training_cost,
    training_settings,
)
from orthomerge.io.files import derive_seed, fingerprint
from orthomerge.training import recover_adapter

if TYPE_CHECKING:
    from orthomerge.experiment.arms import Conversion
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace


@dataclass(frozen=True)
class ConvertStep(AdapterArtifact):
    """Convert a task's adapter, and train it a few steps more where the recipe asks for that."""

    kind = stage = "convert"

    def _how(self, exp: Experiment) -> Conversion:
        how = exp.recipe.arms[self.arm].convert
        assert how is not None
        return how

    def _source(self, exp: Experiment) -> TrainStep:
        return TrainStep(self._how(exp).source, self.task, self.seed, self.rate)

    def _rate(self, exp: Experiment) -> float:
        return self._how(exp).learning_rate or exp_rate(exp, self.task, self.rate)

    def key(self, exp: Experiment) -> str:
        """The hash of the adapter that it was, the statistics, and how it is converted."""
        how = self._how(exp)
        keys = {t: exp.key(step) for t, step in StatisticsStep.for_arm(exp, self.arm).items()}
        own = keys.pop(self.task)
        return fingerprint(
            {
                "piece": ["converted", VERSION],
                "adapter": exp.key(self._source(exp)),
                "convert": _under_old_names(how),
                "others": list(keys.values()),
                "own": own,
                "recover": how.recover
                and [how.recover, self._rate(exp), exp.settings(self.task)[0]],
                "seed": [self.seed, self.task],
            }
        )

    def needs(self, exp: Experiment) -> Sequence[Artifact[Any]]:
        """The adapter that it was, and every task's statistics."""
        return [self._source(exp), *StatisticsStep.for_arm(exp, self.arm).values()]

    def cost(self, exp: Experiment) -> Cost:
        """An eigendecomposition per distinct input, and the steps that follow."""
        how = self._how(exp)
        size = exp.size(exp.recipe.adapter_of(self.arm).targets)
        after = training_cost(exp, self.arm, how.recover * exp.recipe.training.batch_size)
        moments = len(exp.tasks_of(self.arm)) * size.moments()
        work = {"convert": float(DECOMPOSITION * sum(d**3 for d in size.inputs)), **after.work}
        return Cost(work, after.disk, after.memory + moments)

    def read(self, space: Workspace, path: Path) -> Path:
        """The folder, once all of it can be read."""
        return read_folder(path, losses=bool(self._how(space.exp).recover))

    def make(self, space: Workspace, path: Path) -> None:
        """Refit the factors, then train them where that is asked for."""
        exp, how = space.exp, self._how(space.exp)
        found = {t: space.get(s) for t, s in StatisticsStep.for_arm(exp, self.arm).items()}
        own = found.pop(self.task)
        plain = path.with_name("converted") if how.recover else path
        convert_adapters(
            [space.get(self._source(exp))], plain, statistics=[own],
            others=list(found.values()), config=how.config(derive_seed(self.seed, self.task)),
        )  # fmt: skip
        if how.recover:
            self._recover(space, plain, path)

    def _recover(self, space: Workspace, plain: Path, folder: Path) -> None:
        exp = space.exp
        settings, held = training_settings(
            exp, self.task, self.seed, self._rate(exp), max_steps=self._how(exp).recover
        )
        recover_adapter(
            space.model(self.task, self.seed),
            plain,
            exp.data[self.task].train,
            exp.tokenizer,
            regression=exp.head(self.task)[1],
            settings=settings,
            prompt=exp.prompts.get(self.task),
            seed=derive_seed(held, self.task, "recovery"),
            output=folder,
            record={"arm": self.arm, "task": self.task, "seed": self.seed},
            progress=space.reporter.step,
        )


def _under_old_names(how: Conversion) -> dict[str, Any]:
    """The conversion with the names of version 0.1, so that results made then stay valid."""
    values = how.model_dump(exclude={"source", "recover", "learning_rate"})
    old = {new: name for name, new in OLD_NAMES.items()}
    values["subspace"] = old.get(values["subspace"], values["subspace"])
    return {old.get(name, name): value for name, value in values.items()}
