"""What a recipe asks, as far as rows decide it, and the steps behind that.

A recipe with a choice in it (of a learning rate, of a merge's weight) is not one fixed graph: the
rows of some evaluations decide which others are asked for. So the graph is a function of the rows
that are there. Asked again after every evaluation, it grows until nothing is left to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orthomerge.experiment.distill import Distill
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.recipe import AnyMerge
from orthomerge.experiment.steps import DistilledStep, EvaluateStep, MergeStep, Scoring, Step
from orthomerge.io.rows import ResultRow

Rows = Mapping[str, ResultRow]


def asked(exp: Experiment, rows: Rows, *, assume: bool = False) -> list[Scoring]:
    """All evaluations that the recipe asks as far as `rows` decide it, in the recipe's order.

    With `assume`, a choice that is still open falls somewhere, so that the size of the whole run is
    known; a weight then falls on one that has to be tested.
    """
    found: list[Scoring] = []
    for arm in exp.recipe.arms:
        trials = _rate_trials(exp, arm)
        found += [step for of_rate in trials.values() for step in of_rate]
        rate = _rate(exp, arm, trials, rows, assume)
        if rate is None:
            continue
        for seed in exp.recipe.seeds_of(arm):
            found += [EvaluateStep(arm, seed, rate, "test", t) for t in exp.tasks_of(arm)]
            for place in range(len(exp.recipe.merges)):
                found += _merges(exp, arm, seed, rate, place, rows, assume)
    return found


def steps_behind(
    exp: Experiment, evaluations: Iterable[Scoring], rows: Rows, there: Callable[[Path], bool]
) -> dict[str, Step]:
    """The steps that are left to do for the evaluations, by name; each after those it needs.

    An artifact that is `there` needs no step, nor does one that only finished evaluations read.
    """
    found: dict[str, Step] = {}

    def add(step: Step) -> None:
        name = step.name(exp)
        if name in found or step.is_done(exp, rows, there):
            return
        for need in step.needs(exp):
            add(need)
        found[name] = step

    for step in evaluations:
        add(step)
    return found


def _rate_trials(exp: Experiment, arm: str) -> dict[float, list[Scoring]]:
    """The evaluations that an arm's learning rate is chosen by: none where there is one."""
    rates, seed = exp.recipe.learning_rates_of(arm), exp.recipe.seeds_of(arm)[0]
    return {
        rate: [EvaluateStep(arm, seed, rate, "selection", t) for t in exp.tasks_of(arm)]
        for rate in (rates if len(rates) > 1 else [])
    }


def _rate(
    exp: Experiment, arm: str, trials: dict[float, list[Scoring]], rows: Rows, assume: bool
) -> float | None:
    """The arm's learning rate: the best mean single-task score on the selection split.

    Or the lowest one within the recipe's `rate_tolerance` of it. Chosen at the first seed, for all
    tasks together, never by a merge and never on test rows. None where it is still open.
    """
    rates = exp.recipe.learning_rates_of(arm)
    if len(rates) == 1:
        return rates[0]
    scores = {rate: _mean(exp, of_rate, rows) for rate, of_rate in trials.items()}
    known = {rate: score for rate, score in scores.items() if score is not None}
    if len(known) < len(scores):
        return min(rates) if assume else None
    enough = max(known.values()) - exp.recipe.training.rate_tolerance
    return min(rate for rate, score in known.items() if score >= enough)


def _merges(
    exp: Experiment, arm: str, seed: int, rate: float, place: int, rows: Rows, assume: bool
) -> list[Scoring]:
    """One merge of the recipe: its candidates on selection rows, its weights on test rows."""
    merge = exp.recipe.merges[place]
    step = DistilledStep if isinstance(merge, Distill) else MergeStep
    trials: dict[float | None, Scoring] = {
        weight: step(arm, seed, rate, "selection", place, weight)
        for weight in ([*merge.weights, *merge.choose_from] if merge.choose_from else [])
    }
    best = _weight(exp, merge, trials, rows, assume)
    weights = list(dict.fromkeys(merge.weights))
    if best is not None and best not in weights:
        weights.append(best)
    tested = [step(arm, seed, rate, "test", place, weight) for weight in weights]
    return [*trials.values(), *tested]


def _weight(
    exp: Experiment,
    merge: AnyMerge,
    trials: dict[float | None, Scoring],
    rows: Rows,
    assume: bool,
) -> float | None:
    """The weight of `choose_from` and `weights` with the best mean score on selection rows.

    Of weights with equal scores, the one closest to 1. None where there is no choice yet.
    """
    scores = {weight: _mean(exp, [step], rows) for weight, step in trials.items()}
    known = {weight: score for weight, score in scores.items() if score is not None}
    if len(known) == len(scores):
        return max(known, key=lambda weight: (known[weight], -abs((weight or 0) - 1)), default=None)
    untested = [weight for weight in merge.choose_from if weight not in merge.weights]
    return untested[0] if assume and untested else None


def _mean(exp: Experiment, steps: Iterable[Scoring], rows: Rows) -> float | None:
    """The mean score of evaluations, None where a row is missing."""
    keys = [key for step in steps for key in exp.row_keys(step).values()]
    if any(key not in rows for key in keys):
        return None
    return sum(rows[key].value for key in keys) / len(keys)
