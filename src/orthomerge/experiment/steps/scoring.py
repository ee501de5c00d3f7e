"""What the steps that end in result rows share: an update and a head in, a row out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from orthomerge.evaluation.classification import Update, score
from orthomerge.experiment.measured import Costs
from orthomerge.experiment.sizes import EVALUATION_BATCH, BaseSize, count_rows
from orthomerge.experiment.steps.adapters import AdapterStep, adapter_steps
from orthomerge.experiment.steps.step import VERSION, Rows, Step
from orthomerge.io.files import fingerprint
from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.tasks import Row, majority

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.recipe import AnyMerge
    from orthomerge.experiment.workspace import Workspace


@dataclass(frozen=True)
class Scoring(Step):
    """Score an arm's adapters of one seed and rate on a split, into a row for each task."""

    arm: str
    seed: int
    rate: float
    split: str

    @abstractmethod
    def tasks(self, exp: Experiment) -> list[str]:
        """The tasks that are scored."""

    def merge(self, exp: Experiment) -> tuple[AnyMerge, float | None] | None:
        """The recipe's merge and its weight; None for adapters alone."""
        return None

    def adapters(self, exp: Experiment) -> dict[str, AdapterStep]:
        """The adapters that the scores are of, by task."""
        steps = adapter_steps(exp, self.arm, self.seed, self.rate)
        return {task: steps[task] for task in self.tasks(exp)}

    def key(self, exp: Experiment) -> str:
        """The hash of the keys of the rows."""
        return fingerprint(list(exp.row_keys(self).values()))

    def row_keys(self, exp: Experiment) -> Mapping[str, str]:
        """The key of each task's row: the hash of all that it depends on."""
        adapters = [exp.key(step) for step in self.adapters(exp).values()]
        depends = self.depends(exp)
        return {
            task: fingerprint(
                {
                    "piece": ["row", VERSION],
                    "task": task,
                    "split": self.split,
                    "data": exp.data[task].fingerprint,
                    "adapters": adapters,
                }
                | exp.words(task, exp.scoring_of(task))
                | depends
            )
            for task in self.tasks(exp)
        }

    def depends(self, exp: Experiment) -> dict[str, Any]:
        """What the rows depend on besides the adapters and the task."""
        return {}

    def missing(self, exp: Experiment, rows: Rows) -> list[str]:
        """The tasks whose row is not there."""
        return [task for task, key in exp.row_keys(self).items() if key not in rows]

    def is_done(self, exp: Experiment, rows: Rows, there: Callable[[Path], bool]) -> bool:
        """Whether all rows are there."""
        return not self.missing(exp, rows)

    def score_work(self, exp: Experiment) -> float:
        """Operations of scoring all tasks: a pass for each row, or for each answer of a decoder.

        A decoder whose answers are weighed reads each of them separately. Answers that begin with
        the same tokens share a pass; how many do depends on the tokenizer, so all are counted.
        """
        data, size = exp.recipe.data, exp.size(exp.recipe.adapter_of(self.arm).targets)
        rows = data.selection if self.split == "selection" else count_rows(data.test)
        encodes = bool(getattr(exp.meta_model.config, "is_encoder_decoder", False))
        passes = sum(
            1 if encodes or exp.scoring_of(task) != "likelihood" else len(exp.prompts[task].answers)
            for task in self.tasks(exp)
        )
        return 2.0 * size.multiplied * data.max_length * rows * passes

    def score_memory(self, exp: Experiment, size: BaseSize) -> int:
        """The base, a batch of it, the layers as they were, and the adapters."""
        forward = size.activations(EVALUATION_BATCH, exp.recipe.data.max_length)
        adapter = 4 * size.adapter(exp.recipe.adapter_of(self.arm).rank)
        kept = size.updates() * size.bytes_each
        return size.weights + forward // max(size.depth, 1) + kept + adapter * len(self.tasks(exp))

    def row(self, space: Workspace, task: str, update: Update, head: Any) -> ResultRow:
        """The row of one task."""
        exp = space.exp
        data, about = exp.data[task], exp.tasks[task]
        rows = data.selection if self.split == "selection" else data.test
        cost = Costs()
        with cost.stage("eval"):
            metrics = _metrics(space, task, rows, update, head)
        space.costs.add(cost)
        answer = np.full(len(rows), majority(data.train, about.kind))
        constant = score(about.kind, answer, [r.label for r in rows], exp.head(task)[0])
        arm, merged = exp.recipe.arms[self.arm], self.merge(exp)
        return ResultRow(
            task=task,
            arm=self.arm,
            start=arm.start,
            solver=arm.solver,
            granularity=arm.granularity if arm.solver else None,
            constraint=arm.constraint,
            learning_rate=self.rate,
            method=merged[0].method if merged else SINGLE,
            weight=merged[1] if merged else None,
            metric=about.metric,
            value=metrics[about.metric],
            seed=self.seed,
            n=len(rows),
            split=self.split,
            key=exp.row_keys(self)[task],
            options=merged[0].arguments if merged else {},
            metrics=metrics,
            majority=constant[about.metric],
            seconds=round(cost.seconds["eval"], 3),
            form=exp.recipe.form,
            scoring=exp.scoring_of(task),
        )


def _metrics(
    space: Workspace, task: str, rows: Sequence[Row], update: Update, head: Mapping[str, Tensor]
) -> dict[str, float]:
    """All metrics of the task, asked in words or with its head."""
    exp, about = space.exp, space.exp.tasks[task]
    if scoring := exp.scoring_of(task):
        said = space.text_evaluator.predict(
            rows, exp.prompts[task], update, scoring=scoring, progress=space.reporter.step
        )
        return said.metrics(about.kind, [r.label for r in rows], about.outputs)
    return space.evaluator.score(about, rows, update, head, progress=space.reporter.step)
