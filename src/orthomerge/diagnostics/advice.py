"""Advice in one line each, with the figure it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from orthomerge.diagnostics.couplings import Couplings
from orthomerge.diagnostics.overlap import Overlap
from orthomerge.diagnostics.shift import shift_of_sum
from orthomerge.diagnostics.study import borne_out
from orthomerge.diagnostics.weights import BestWeight

WORTH = 0.02
"""A change of the mean shift below this is not worth a line."""
LOUD = 3.0
"""How many times the smallest norm the largest may be before it is said."""


class Advice(NamedTuple):
    """One line: what it is about, what to do, and by how much the figure changes."""

    kind: str
    text: str
    before: float
    after: float


def advise(found: Couplings, plain: BestWeight, methods: Mapping[str, BestWeight]) -> list[Advice]:
    """What would lower the predicted shift most: weight, method, an adapter less, a layer less.

    `plain` is the sum at its best weight, `methods` others at theirs. A kind of advice whose
    predictor did not beat plain cosine similarity in the study is left out.
    """
    lines: list[Advice] = []
    if borne_out("merges"):
        lines += _weight(plain) + _method(plain, methods)
    if borne_out("leave_out") and len(found.names) > 2:
        lines += _leave_out(found, plain)
    if borne_out("layers") and len(found.layers) > 1:
        lines += _layer(found, plain)
    return lines


def notes(found: Overlap) -> list[str]:
    """What the factors alone show that a merge should know of."""
    lines: list[str] = []
    for i, j in found.shared_starts:
        lines.append(
            f"{found.names[i]} and {found.names[j]} began from one A (mean cosine of its rows "
            f"{found.start_alike[i, j]:.2f}): they read the same directions of the input."
        )
    norms = cast(list[float], found.norms.tolist())
    small, large = min(norms), max(norms)
    if small == 0:
        lines.append(f"{found.names[norms.index(small)]} is zero everywhere: leave it out.")
    elif large > LOUD * small:
        lines.append(
            f"{found.names[norms.index(large)]} is {large / small:.1f} times as large as "
            f"{found.names[norms.index(small)]} (norms {large:.3g}, {small:.3g}): under equal "
            "weights it dominates."
        )
    return lines


def _weight(plain: BestWeight) -> list[Advice]:
    before, after = plain.untuned.mean, plain.shift.mean
    if before - after < WORTH:
        return []
    text = (
        f"sum at weight {plain.weight:.2f}, not 1: predicted shift {after:.2f}, not {before:.2f}."
    )
    return [Advice("weight", text, before, after)]


def _method(plain: BestWeight, methods: Mapping[str, BestWeight]) -> list[Advice]:
    if not methods:
        return []
    name = min(methods, key=lambda m: methods[m].shift.mean)
    best = methods[name]
    before, after = plain.shift.mean, best.shift.mean
    if before - after < WORTH:
        return []
    text = (
        f"prefer {name} at weight {best.weight:.2f}: predicted shift {after:.2f}, the best sum's "
        f"{before:.2f}."
    )
    return [Advice("method", text, before, after)]


def _leave_out(found: Couplings, plain: BestWeight) -> list[Advice]:
    """The adapter without which the others are disturbed least."""
    size = len(found.names)
    gains: list[tuple[float, float, float]] = []
    for out in range(size):
        stay = [i for i in range(size) if i != out]
        weights = [0.0 if i == out else plain.weight for i in range(size)]
        before = float(plain.shift.total[stay].mean())
        after = float(shift_of_sum(found, weights).total[stay].mean())
        gains.append((before - after, before, after))
    gain, before, after = max(gains)
    if gain < WORTH:
        return []
    name = found.names[gains.index((gain, before, after))]
    text = f"without {name} the others' predicted shift is {after:.2f}, not {before:.2f}."
    return [Advice("leave_out", text, before, after)]


def _layer(found: Couplings, plain: BestWeight) -> list[Advice]:
    """The layer at whose half weight the tasks are disturbed least."""
    size, before = len(found.names), plain.shift.mean
    whole = dict.fromkeys(found.layers, [plain.weight] * size)
    halved = {
        layer: shift_of_sum(found, whole | {layer: [plain.weight / 2] * size}).mean
        for layer in found.layers
    }
    layer = min(halved, key=lambda name: halved[name])
    after = halved[layer]
    if before - after < WORTH / 4:
        return []
    text = f"halve the weight of {layer}: predicted shift {after:.3f}, not {before:.3f}."
    return [Advice("layer", text, before, after)]
