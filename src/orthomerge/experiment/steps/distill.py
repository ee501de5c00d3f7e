"""An arm's adapters distilled into one, and every task scored under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters import Adapter, read_adapter
from orthomerge.experiment.distill import Distill
from orthomerge.experiment.sizes import TRAINING_BYTES
from orthomerge.experiment.steps.adapters import AdapterStep, adapter_steps
from orthomerge.experiment.steps.fisher import FisherStep
from orthomerge.experiment.steps.merge import MergeStep, said
from orthomerge.experiment.steps.start import read_folder
from orthomerge.experiment.steps.statistics import StatisticsStep
from orthomerge.experiment.steps.step import VERSION, Artifact, Cost
from orthomerge.io.files import fingerprint
from orthomerge.io.rows import DISTILL
from orthomerge.merging import MergedUpdate
from orthomerge.training import DistillSettings, distill_adapters

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace

TEACHERS = "teachers"
"""Where a run keeps the adapters' own answers, for all that is distilled from them."""


@dataclass(frozen=True)
class DistillStep(Artifact[Path]):
    """Merge an arm's adapters and train the merge to give each one's own answers.

    `entry` is its place in the recipe's merges, `weight` that of the merge it begins from.
    """

    kind = stage = DISTILL
    arm: str
    seed: int
    rate: float
    entry: int
    weight: float | None

    def title(self, exp: Experiment) -> str:
        """The step in words."""
        return f"distill {self.arm} · {self.how(exp).source.label} · seed {self.seed}"

    def how(self, exp: Experiment) -> Distill:
        """The recipe's entry."""
        how = exp.recipe.merges[self.entry]
        assert isinstance(how, Distill)
        return how

    def settings(self, exp: Experiment) -> DistillSettings:
        """How it is trained."""
        return self.how(exp).settings(self.seed, exp.recipe.data.max_length)

    def adapters(self, exp: Experiment) -> dict[str, AdapterStep]:
        """The steps that make the teachers, by task."""
        return adapter_steps(exp, self.arm, self.seed, self.rate)

    def _needed(self, exp: Experiment) -> tuple[list[StatisticsStep], list[FisherStep]]:
        """What the method to begin from reads."""
        source = self.how(exp).source
        if source.layer_wise:
            return [], []
        method = source.method
        return (
            StatisticsStep.for_method(exp, self.arm, method),
            FisherStep.for_method(exp, self.arm, self.seed, self.rate, method),
        )

    def key(self, exp: Experiment) -> str:
        """The hash of adapters, texts, the merge to begin from, and settings that are not usual."""
        how, settings = self.how(exp), asdict(self.settings(exp))
        statistics, fisher = self._needed(exp)
        usual = asdict(DistillSettings())
        texts = {t: [exp.data[t].fingerprint, exp.words(t)] for t in exp.tasks_of(self.arm)}
        return fingerprint(
            {
                "piece": [DISTILL, VERSION],
                "adapters": [exp.key(step) for step in self.adapters(exp).values()],
                "from": [
                    how.source.method,
                    self.weight,
                    how.source.options,
                    *(["layer_wise"] if how.source.layer_wise else []),
                ],
                "statistics": [exp.key(step) for step in statistics],
                "fisher": [exp.key(step) for step in fisher],
                "texts": [how.texts_key(), how.samples, texts],
                "rank": how.rank,
                "answer_tokens": how.answer_tokens,
                "settings": {k: v for k, v in settings.items() if v != usual[k]},
            }
        )

    def path(self, exp: Experiment) -> Path:
        """A folder under `distilled/`."""
        name = f"{DISTILL}-w{said(self.weight)}-{exp.key(self)[:12]}"
        return exp.output / "distilled" / self.arm / f"seed{self.seed}" / name

    def needs(self, exp: Experiment) -> Sequence[Artifact[Any]]:
        """The adapters, and what the method to begin from reads."""
        statistics, fisher = self._needed(exp)
        return [*self.adapters(exp).values(), *statistics, *fisher]

    def cost(self, exp: Experiment) -> Cost:
        """Each teacher's pass over its texts, passes there and back in every step, measurements."""
        how, settings, shape = self.how(exp), self.settings(exp), exp.recipe.adapter_of(self.arm)
        (rank,), (samples,) = how.rank, how.samples
        tasks, size = len(exp.tasks_of(self.arm)), exp.size(shape.targets)
        length = settings.max_length or exp.recipe.data.max_length
        adapter = size.adapter(rank if isinstance(rank, int) else tasks * shape.rank)
        answers = tasks * samples * length * size.width * size.bytes_each
        passes = settings.rows_a_pass
        memory = size.weights + size.activations(passes, length) + size.logits(passes, length)
        measured = settings.held_out * (settings.steps / settings.every)
        rows = tasks * (samples * (1 + measured) + 2 * settings.steps * settings.batch_size)
        if how.source.layer_wise:  # half a pass, on the mean, for each distinct input
            rows += tasks * samples * len(size.inputs) / 2
        work = {DISTILL: 2.0 * size.multiplied * length * rows}
        disk = 4 * adapter + (answers if self._is_first(exp) else 0)
        return Cost(work, disk, memory + TRAINING_BYTES * adapter + answers)

    def _is_first(self, exp: Experiment) -> bool:
        """Whether it is the recipe's first to ask these teachers on these texts."""
        mine = self.how(exp)
        same = [
            (entry, weight)
            for entry, other in enumerate(exp.recipe.merges)
            if isinstance(other, Distill) and other.asks == mine.asks
            for weight in other.weights
        ]
        return same[0] == (self.entry, self.weight)

    def read(self, space: Workspace, path: Path) -> Path:
        """The folder, once all of it can be read."""
        return read_folder(path)

    def make(self, space: Workspace, path: Path) -> None:
        """Distill; what a stopped call had done is next to the folder until it is called again."""
        exp, how = space.exp, self.how(space.exp)
        target, statistics = self.path(exp), self._needed(exp)[0]

        def tell(what: str, done: int, of: int, measured: object) -> None:
            if what != "measured":
                space.reporter.step(done, of)

        space.free_backbone()
        distill_adapters(
            [
                replace(read_adapter(space.get(step)), name=task)
                for task, step in self.adapters(exp).items()
            ],
            how.draw_from({task: exp.data[task].train for task in exp.tasks_of(self.arm)}),
            how.config(self.weight, self.seed),
            rank=how.rank[0],
            layer_wise=how.source.layer_wise,
            statistics=[space.get(step) for step in statistics] or None,
            fisher=[space.get(step) for step in self._needed(exp)[1]] or None,
            form="text" if exp.in_words else "classifier",
            samples=how.samples[0],
            settings=self.settings(exp),
            prompts=[exp.prompts[t] for t in exp.tasks_of(self.arm)] if exp.in_words else None,
            answer_tokens=how.answer_tokens,
            output=path,
            work=target.with_name(f"{target.name}.work"),
            cache=exp.output / TEACHERS,
            progress=tell,
        )


@dataclass(frozen=True)
class DistilledStep(MergeStep):
    """Score every task under a distilled merge."""

    def _made(self) -> DistillStep:
        return DistillStep(self.arm, self.seed, self.rate, self.place, self.weight)

    def depends(self, exp: Experiment) -> dict[str, Any]:
        """The distillation."""
        return {DISTILL: exp.key(self._made())}

    def needs(self, exp: Experiment) -> Sequence[Artifact[Any]]:
        """The adapters, whose heads are used, and the distilled merge."""
        return [*self.adapters(exp).values(), self._made()]

    def folder(self, exp: Experiment) -> Path:
        """Where the distilled adapter is."""
        return self._made().path(exp)

    def cost(self, exp: Experiment) -> Cost:
        """A pass for each row of every task."""
        size = exp.size(exp.recipe.adapter_of(self.arm).targets)
        return Cost({"eval": self.score_work(exp)}, 0, self.score_memory(exp, size))

    def update(self, space: Workspace, adapters: Mapping[str, Adapter]) -> MergedUpdate:
        """The distilled merge, made now where it is not there."""
        layers = read_adapter(space.get(self._made())).layers
        return MergedUpdate(layers, DISTILL)
