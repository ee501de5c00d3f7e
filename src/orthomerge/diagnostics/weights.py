"""Merge weights that disturb least, found from statistics alone: no labels, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from scipy.optimize import minimize_scalar  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from orthomerge.adapters import Adapter
from orthomerge.diagnostics.couplings import Couplings
from orthomerge.diagnostics.shift import Shift, predict_shift, shift_of_sum
from orthomerge.errors import MergeError
from orthomerge.merging import MergeConfig, iter_merge
from orthomerge.statistics import Statistics

HIGHEST = 3.0
"""The largest weight that is tried; the best ones of all methods of the study lie below it."""
TRIALS = 12


class BestWeight(NamedTuple):
    """The common weight with the least mean shift, and the shifts there and untuned."""

    weight: float
    shift: Shift
    untuned: Shift


def best_weight_of_sum(found: Couplings) -> BestWeight:
    """The best common weight of the plain sum, in closed form a trial."""
    return _search(lambda w: shift_of_sum(found, [w] * len(found.names)), trials=60)


def best_weight(
    adapters: Sequence[Adapter],
    statistics: Sequence[Statistics],
    config: MergeConfig | None = None,
    *,
    fisher: Sequence[Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> BestWeight:
    """The common weight of any merge at which the mean predicted shift is least.

    The weights of `config` are not looked at; `asked` are its fields and options in place of it, as
    of `merge_adapters`, and `fisher` is for a method that needs it.
    Bounded search by Brent's method over (0, 3], a whole merge a trial: 13 of them.

    Raises:
        MergeError, StatisticsError: what the merge and the prediction raise.
    """
    config = MergeConfig.of(config, **asked)
    given = {"statistics": statistics} if "moments" in config.needs else {}
    tried = 0

    def at(weight: float) -> Shift:
        nonlocal tried
        layers = iter_merge(
            [a.layers for a in adapters], replace(config, weights=weight), fisher=fisher, **given
        )
        found = predict_shift(layers, adapters, statistics)
        tried += 1
        if progress:
            progress(min(tried, TRIALS + 1), TRIALS + 1)
        return found

    return _search(at, trials=TRIALS)


def _search(at: Callable[[float], Shift], *, trials: int) -> BestWeight:
    untuned = at(1.0)
    seen: dict[float, Shift] = {1.0: untuned}

    def value(weight: float) -> float:
        seen[float(weight)] = found = at(float(weight))
        return found.mean

    minimize_scalar(
        value, bounds=(0.0, HIGHEST), method="bounded", options={"maxiter": trials, "xatol": 1e-3}
    )
    best = min(seen, key=lambda w: seen[w].mean)
    if not seen[best].mean < float("inf"):
        raise MergeError(
            "no weight follows from these statistics: an adapter puts out nothing on its own "
            "task's inputs; leave it out."
        )
    return BestWeight(best, seen[best], untuned)
