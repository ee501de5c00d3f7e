"""Evaluations carried out: adapters alone and merges, scored into result rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from orthomerge.adapters import Adapter, read_adapter, save_merged
from orthomerge.evaluation.classification import Evaluator, Update, score
from orthomerge.evaluation.text import TextEvaluator
from orthomerge.experiment.arms import Merge
from orthomerge.experiment.costs import Costs
from orthomerge.experiment.graph import Evaluation
from orthomerge.experiment.keys import MERGE_GRANULARITY
from orthomerge.experiment.pieces import Pieces
from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.merging import MergedUpdate, get_method, merge_layers
from orthomerge.models.loading import load_language_model
from orthomerge.tasks import Row, majority


class Scores:
    """Scores what evaluations ask for; every row is handed on as soon as it is there."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces, self._keys, self._recipe = pieces, pieces.keys, pieces.keys.recipe

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores updates on the base model."""
        return Evaluator(
            self._keys.base.path_or_id,
            self._keys.tokenizer,
            max_length=self._recipe.data.max_length,
        )

    @cached_property
    def text_evaluator(self) -> TextEvaluator:
        """Scores updates on the base as a language model."""
        return TextEvaluator(
            load_language_model(self._keys.base.path_or_id),
            self._keys.tokenizer,
            max_length=self._recipe.data.max_length,
        )

    def single(self, asked: Evaluation, emit: Callable[[ResultRow], None]) -> None:
        """A task under its own adapter alone."""
        ((task, _key),) = asked.keys
        adapter = read_adapter(self._pieces.adapter(asked.arm, task, asked.seed, asked.rate))
        self._pieces.reporter.stage(f"evaluate {asked.arm} · {task} · own adapter")
        emit(self._row(asked, task, adapter.layers, adapter.modules))

    def merged(
        self, asked: Evaluation, emit: Callable[[ResultRow], None], missing: Collection[str]
    ) -> None:
        """A merge of the arm's adapters, kept where the recipe says so, on the missing tasks."""
        assert asked.merge is not None and asked.weight is not None
        merge, tasks = self._recipe.merges[asked.merge], self._keys.tasks_of(asked.arm)
        adapters = {
            t: read_adapter(self._pieces.adapter(asked.arm, t, asked.seed, asked.rate))
            for t in tasks
        }
        self._pieces.reporter.stage(f"merge {asked.arm} · {merge.method} · weight {asked.weight:g}")
        update = self.update(asked.arm, asked.seed, asked.rate, merge, asked.weight, adapters)
        if self._recipe.save_merged and asked.split == "test":
            with self._pieces.costs.stage("merge"):
                self._save(asked, merge, update, adapters)
        for place, task in enumerate(tasks):
            if task in missing:
                emit(self._row(asked, task, update.of(place), adapters[task].modules))

    def update(
        self,
        arm: str,
        seed: int,
        rate: float,
        merge: Merge,
        weight: float,
        adapters: Mapping[str, Adapter],
    ) -> MergedUpdate:
        """An arm's adapters, by task, merged as `merge` says, with what its method needs beside."""
        needed = self._needed(arm, seed, rate, merge, list(adapters))
        with self._pieces.costs.stage("merge"):
            return merge_layers(
                [a.layers for a in adapters.values()], merge.config(weight, seed), **needed
            )

    def _needed(
        self, arm: str, seed: int, rate: float, merge: Merge, tasks: Sequence[str]
    ) -> dict[str, Any]:
        """The statistics or the Fisher information of every task, where the method needs them."""
        needs = get_method(merge.method).needs
        given: dict[str, Any] = {}
        if "moments" in needs:
            targets = self._recipe.arms[arm].targets
            given["statistics"] = [
                self._pieces.statistics(t, MERGE_GRANULARITY, targets=targets) for t in tasks
            ]
        if "fisher" in needs:
            given["fisher"] = [self._pieces.fisher(arm, t, seed, rate) for t in tasks]
        return given

    def _save(
        self,
        asked: Evaluation,
        merge: Merge,
        merged: MergedUpdate,
        adapters: dict[str, Adapter],
    ) -> None:
        assert asked.weight is not None
        path = self._keys.merged_path(asked.arm, asked.seed, asked.rate, merge, asked.weight)
        if path.is_dir():
            return
        save_merged(
            path,
            merged,
            list(adapters.values()),
            merge.config(asked.weight, asked.seed),
            names=list(adapters),
        )

    def _row(self, asked: Evaluation, task: str, update: Update, head: Any) -> ResultRow:
        data, about = self._keys.data[task], self._keys.tasks[task]
        rows = data.selection if asked.split == "selection" else data.test
        labels, _ = self._keys.head(task)
        cost = Costs()
        with cost.stage("eval"):
            metrics = self._metrics(task, rows, update, head)
        self._pieces.costs.add(cost)
        truth = [r.label for r in rows]
        answer = majority(data.train, about.kind)
        constant = score(about.kind, np.full(len(rows), answer), truth, labels)
        arm = self._recipe.arms[asked.arm]
        merge = None if asked.merge is None else self._recipe.merges[asked.merge]
        return ResultRow(
            task=task,
            arm=asked.arm,
            start=arm.start,
            solver=arm.solver,
            granularity=arm.granularity if arm.solver else None,
            constraint=arm.constraint,
            learning_rate=asked.rate,
            method=SINGLE if merge is None else merge.method,
            weight=asked.weight,
            metric=about.metric,
            value=metrics[about.metric],
            seed=asked.seed,
            n=len(rows),
            split=asked.split,
            key=dict(asked.keys)[task],
            options=merge.arguments if merge else {},
            metrics=metrics,
            majority=constant[about.metric],
            seconds=round(cost.seconds["eval"], 3),
            form=self._recipe.form,
            scoring=self._keys.scoring_of(task),
        )

    def _metrics(
        self, task: str, rows: Sequence[Row], update: Update, head: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """All metrics of the task, asked in words or with its head."""
        kind, truth = self._keys.tasks[task].kind, [r.label for r in rows]
        labels, regression = self._keys.head(task)
        if scoring := self._keys.scoring_of(task):
            prompt = self._keys.prompts[task]
            said = self.text_evaluator.predict(
                rows, prompt, update, scoring=scoring, progress=self._pieces.reporter.step
            )
            return said.metrics(kind, truth, labels)
        predictions = self.evaluator.predict(
            rows, update, head, num_labels=labels, regression=regression,
            progress=self._pieces.reporter.step,
        )  # fmt: skip
        return score(kind, predictions, truth, labels)
