"""Fisher information of one task's adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orthomerge.adapters import read_adapter
from orthomerge.experiment.steps.adapters import AdapterStep, adapter_step
from orthomerge.experiment.steps.step import VERSION, Artifact, Cost
from orthomerge.fisher import SUFFIX, Fisher, load_fisher, save_fisher
from orthomerge.io.files import fingerprint
from orthomerge.merging import get_method
from orthomerge.tuning import fisher_on_texts

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace


@dataclass(frozen=True)
class FisherStep(Artifact[Fisher]):
    """Collect the Fisher information of an adapter on the sample of its task's statistics."""

    kind = stage = "fisher"
    stays = False  # as large as a dense update
    arm: str
    task: str
    seed: int
    rate: float

    @classmethod
    def for_method(
        cls, exp: Experiment, arm: str, seed: int, rate: float, method: str
    ) -> list[FisherStep]:
        """The Fisher information that a merging method reads; none where it needs none."""
        needed = "fisher" in get_method(method).needs
        return [cls(arm, task, seed, rate) for task in exp.tasks_of(arm)] if needed else []

    def title(self, exp: Experiment) -> str:
        """The step in words."""
        return f"Fisher information of {self.arm} · {self.task} · seed {self.seed}"

    def key(self, exp: Experiment) -> str:
        """The hash of the adapter and of the sample."""
        return fingerprint(
            {
                "piece": ["fisher", VERSION],
                "adapter": exp.key(self._adapter(exp)),
                "statistics": exp.recipe.statistics.model_dump(),
            }
        )

    def _adapter(self, exp: Experiment) -> AdapterStep:
        return adapter_step(exp, self.arm, self.task, self.seed, self.rate)

    def path(self, exp: Experiment) -> Path:
        """A file under `fisher/`."""
        folder = self.place(exp, "fisher", self.arm, self.task, self.seed)
        return folder.with_name(folder.name + SUFFIX)

    def needs(self, exp: Experiment) -> Sequence[AdapterStep]:
        """The adapter."""
        return [self._adapter(exp)]

    def cost(self, exp: Experiment) -> Cost:
        """A pass there and back for each text of the sample."""
        length, samples = exp.recipe.data.max_length, exp.recipe.statistics.samples
        size = exp.size(exp.recipe.adapter_of(self.arm).targets)
        memory = size.weights + size.activations(1, length) + 12 * size.updates()
        work = {"fisher": 4.0 * size.multiplied * length * samples}
        return Cost(work, 4 * size.updates(), memory)

    def read(self, space: Workspace, path: Path) -> Fisher:
        """The file, if it is of this very adapter."""
        adapter = read_adapter(space.get(self._adapter(space.exp)))
        return load_fisher(path, adapter_sha256=adapter.sha256)

    def make(self, space: Workspace, path: Path) -> None:
        """Collect over the sample."""
        exp = space.exp
        found, meta = fisher_on_texts(
            read_adapter(space.get(self._adapter(exp))),
            exp.tasks[self.task],
            space.sample(self.task, exp.recipe.statistics.samples),
            exp.base,
            exp.tokenizer,
            max_length=exp.recipe.data.max_length,
            prompt=exp.prompts.get(self.task),
        )
        save_fisher(path, found, meta)
