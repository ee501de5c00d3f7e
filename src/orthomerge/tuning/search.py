"""Merge weights searched on validation rows by Optuna; a study on disk that can be gone on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthomerge.errors import MergeError
from orthomerge.evaluation.classification import Evaluator, score
from orthomerge.merging import MergedUpdate, merge_layers, plan_merge
from orthomerge.tuning.groups import depth_groups
from orthomerge.tuning.inputs import Inputs, tokenizer_of
from orthomerge.tuning.result import Method, Trial, Tuned
from orthomerge.tuning.study import (
    complete,
    enqueue,
    one_trial,
    open_study,
    quiet_optuna,
    require_optuna,
)

_UNIFORM = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class SearchSettings:
    """How weights are searched.

    `trials` in all, those of an earlier run included; `groups` of layers in depth, each with
    weights of its own; weights lie in [`low`, `high`].
    """

    trials: int = 50
    groups: int = 1
    low: float = 0.0
    high: float = 1.5
    seed: int = 0
    max_length: int = 48

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise MergeError(
                f"weights from {self.low:g} to {self.high:g}: give finite ends, the lowest first."
            )
        if self.trials < 1:
            raise MergeError(f"{self.trials} trials: ask for at least one.")


def search_weights(
    inputs: Inputs,
    output: str | Path,
    *,
    method: Method | None = None,
    settings: SearchSettings | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Tuned:
    """The merge weights of the best mean score on the tasks' selection rows.

    `argmax_w (1/T) Σ_t m_t(merge(ΔW_1..N; w))` with m_t the task's own metric, under the head of
    its own adapter; one weight an adapter, or one an adapter and group of layers. Tried first: 1
    for all, 1/N for all, and .2, .4, .6, .8 for all; then what Optuna's TPE proposes (Bergstra et
    al. 2011), each proposal under a seed of its own, so that a search that was stopped goes on as
    it would have. Cost: a merge and T predictions over the rows a trial.

    The study is an SQLite file in `output`: a run that was killed at any moment, or two that run
    at once, leave it whole; a rerun goes on to the number of trials asked for, two runs share them.

    Args:
        inputs: adapters, tasks and rows, from `read_inputs`.
        output: the folder of the study; made when everything else was found to be right.
        method: how the adapters are merged; linear by default.
        settings: of the search.
        progress: called with the trials done, their total and the best score so far.

    Raises:
        MergeError: the method's options, the groups or the range of weights do not fit, or the
            study in `output` was made for something else.
        OrthomergeError: Optuna is not installed, or the folder cannot be written.
        AdapterError: an adapter or a head that does not fit the base.
    """
    method, settings = method or Method(), settings or SearchSettings()
    require_optuna()
    problem = _Problem(inputs, method, settings)
    problem.check()
    study = open_study(Path(output), _made_for(inputs, method, settings))
    with quiet_optuna():
        enqueue(study, problem.starts(), Path(output))
        done = complete(study)
        while len(done) < settings.trials:
            one_trial(
                study, problem.scores, count=len(problem.labels), low=settings.low,
                high=settings.high, seed=settings.seed,
            )  # fmt: skip
            done = complete(study)
            if progress is not None:
                progress(len(done), settings.trials, max(t.value for t in done))
    return problem.tuned(done)


class _Problem:
    """The function that is maximised: weights in, the score of every task out."""

    def __init__(self, inputs: Inputs, method: Method, settings: SearchSettings) -> None:
        self._inputs, self._method, self._settings = inputs, method, settings
        self._layers = [adapter.layers for adapter in inputs.adapters]
        self._groups = depth_groups(inputs.layers, settings.groups)
        self._evaluator: Evaluator | None = None
        places = range(1, settings.groups + 1)
        self.labels = [
            name if settings.groups == 1 else f"{name}, part {place} of {settings.groups}"
            for place in places
            for name in inputs.names
        ]

    def check(self) -> None:
        """Try everything once where it costs little: method, options, weights, base and heads."""
        ones = [1.0] * len(self.labels)
        plan = plan_merge(self._layers, **self._method.arguments(**self._weights(ones)))
        layer = plan.merge(plan.names[0])
        for i, task in enumerate(self._inputs.tasks):
            update = layer.tasks[i] if layer.tasks else layer.update
            self._evaluate().predict(
                task.rows[:0],
                {layer.name: update},
                self._inputs.adapters[i].modules,
                num_labels=task.outputs,
                regression=task.regression,
            )

    def starts(self) -> list[list[float]]:
        """What is tried first, as far as the range of weights allows it."""
        settings = self._settings
        alike = [1.0, 1 / len(self._layers), *_UNIFORM]
        allowed = [w for w in dict.fromkeys(alike) if settings.low <= w <= settings.high]
        return [[weight] * len(self.labels) for weight in allowed]

    def scores(self, weights: Sequence[float]) -> list[float]:
        """Each task's main metric on its selection rows."""
        merged = merge_layers(self._layers, **self._method.arguments(**self._weights(weights)))
        return [self._score(i, merged) for i in range(len(self._inputs.tasks))]

    def tuned(self, trials: list[Trial]) -> Tuned:
        """The best trial; of equals the first."""
        settings = self._settings
        best = max(trials, key=lambda trial: (trial.value, -trial.number))
        chosen = self._weights(best.weights)
        by_layer: dict[str, list[float]] = chosen.get("layer_weights") or {}
        count = len(self._layers)
        return Tuned(
            objective="validation",
            weights=chosen.get("weights") or _means(list(by_layer.values()), count),
            layer_weights=by_layer,
            value=best.value,
            tasks=best.tasks,
            best=best.number,
            trials=trials,
            labels=self.labels,
            method=self._method,
            settings={
                "trials": len(trials), "groups": settings.groups, "low": settings.low,
                "high": settings.high, "seed": settings.seed, "max_length": settings.max_length,
            },
        )  # fmt: skip

    def _weights(self, flat: Sequence[float]) -> dict[str, Any]:
        """The weights as merging takes them: one an adapter, or by group of layers."""
        if len(self._groups) == 1:
            return {"weights": list(flat)}
        count = len(self._layers)
        return {
            "layer_weights": {
                group: list(flat[i * count : (i + 1) * count])
                for i, group in enumerate(self._groups)
            }
        }

    def _score(self, index: int, merged: MergedUpdate) -> float:
        task = self._inputs.tasks[index]
        predictions = self._evaluate().predict(
            task.rows,
            merged.of(index),
            self._inputs.adapters[index].modules,
            num_labels=task.outputs,
            regression=task.regression,
        )
        truth = [row.label for row in task.rows]
        return score(task.task.kind, predictions, truth, task.outputs)[task.task.metric]

    def _evaluate(self) -> Evaluator:
        if self._evaluator is None:
            base = self._inputs.base
            self._evaluator = Evaluator(
                base.path_or_id, tokenizer_of(base), max_length=self._settings.max_length
            )
        return self._evaluator


def _means(rows: list[list[float]], count: int) -> list[float]:
    return [sum(row[i] for row in rows) / len(rows) for i in range(count)]


def _made_for(inputs: Inputs, method: Method, settings: SearchSettings) -> dict[str, Any]:
    """All that a trial's score depends on, by the words in which a mismatch is said."""
    return {
        **inputs.record(),
        "method": method.record(),
        "groups of layers": settings.groups,
        "range of weights": [settings.low, settings.high],
        "maximum length": settings.max_length,
        "seed": settings.seed,
    }
