"""One process at work on an experiment: what it keeps loaded, and what its steps took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

from orthomerge.errors import OrthomergeError
from orthomerge.evaluation.classification import Evaluator
from orthomerge.evaluation.text import TextEvaluator
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.measured import Costs
from orthomerge.experiment.progress import Reporter
from orthomerge.experiment.steps import Artifact, Step
from orthomerge.io.files import atomic_path, derive_seed
from orthomerge.io.rows import ResultRow
from orthomerge.models.loading import (
    exact_device,
    in_precision,
    load_backbone,
    load_classifier,
    load_language_model,
)
from orthomerge.statistics import batches, sample_texts

_T = TypeVar("_T")


class Workspace:
    """Does the steps of one experiment, one after another; models stay loaded between them."""

    def __init__(self, exp: Experiment, reporter: Reporter | None = None) -> None:
        self.exp, self.reporter = exp, reporter or Reporter()
        self.costs = Costs()
        self._read: dict[Artifact[Any], Any] = {}

    def release(self) -> None:
        """Let go of the models and artifacts that are kept loaded."""
        self._read.clear()
        for name in ("backbone", "evaluator", "text_evaluator"):
            self.__dict__.pop(name, None)

    def perform(self, step: Step, emit: Callable[[ResultRow], None]) -> Costs:
        """Do a step; returns what each stage took. An artifact that is whole is left as it is."""
        self.costs = costs = Costs()
        step.run(self, emit)
        return costs

    def get(self, step: Artifact[_T]) -> _T:
        """What a step makes: read if it is there, else made now, after what it needs.

        An artifact that was damaged since it was written is made again in its place. It stays
        until then, so that a kill meanwhile does not hide the damage.
        """
        if step in self._read:
            return self._read[step]
        path = step.path(self.exp)
        found = self._whole(step) if path.exists() else None
        if found is None:
            for need in step.needs(self.exp):
                self.get(need)
            self.reporter.stage(step.title(self.exp))
            with self.costs.stage(step.stage), atomic_path(path, replace=True) as place:
                step.make(self, place)
            found = step.read(self, path)
        if step.stays:
            self._read[step] = found
        return found

    def _whole(self, step: Artifact[_T]) -> _T | None:
        path = step.path(self.exp)
        try:
            return step.read(self, path)
        except OrthomergeError:
            self.reporter.stage(f"{path.name} was damaged: it is made again")
            return None

    # What steps share ---------------------------------------------------------------------------

    @cached_property
    def backbone(self) -> Any:
        """The base model without a head, for statistics."""
        return load_backbone(self.exp.base.path_or_id).to(exact_device())

    def free_backbone(self) -> None:
        """Make room for a training."""
        self.__dict__.pop("backbone", None)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores updates on the base model."""
        return Evaluator(
            self.exp.base.path_or_id,
            self.exp.tokenizer,
            max_length=self.exp.recipe.data.max_length,
            precision=self.exp.recipe.training.precision,
        )

    @cached_property
    def text_evaluator(self) -> TextEvaluator:
        """Scores updates on the base as a language model."""
        return TextEvaluator(
            in_precision(
                load_language_model(self.exp.base.path_or_id), self.exp.recipe.training.precision
            ),
            self.exp.tokenizer,
            max_length=self.exp.recipe.data.max_length,
        )

    def model(self, task: str, seed: int) -> Any:
        """What an adapter is trained on: a language model for words, else the base with a head.

        The task's head is fresh and the same for every arm of one seed.
        """
        base = self.exp.base
        if self.exp.in_words:
            return load_language_model(base.path_or_id, name=base.name)
        labels, regression = self.exp.head(task)
        return load_classifier(
            base.path_or_id,
            num_labels=labels,
            regression=regression,
            seed=derive_seed(seed, task, "head"),
            name=base.name,
        )

    def sample(self, task: str, samples: int) -> list[tuple[str, str | None]]:
        """The texts behind a task's statistics and its Fisher information."""
        texts = [(r.text, r.pair) for r in self.exp.data[task].train]
        return sample_texts(texts, samples, derive_seed(self.exp.recipe.statistics.seed, task))

    def batches(
        self, task: str, texts: Sequence[tuple[str, str | None]]
    ) -> Iterator[dict[str, Any]]:
        """Texts as the task's training reads them: in its prompt, where there is one."""
        if self.exp.in_words:
            return self.exp.wording(task).batches(texts)
        return batches(texts, self.exp.tokenizer, max_length=self.exp.recipe.data.max_length)
