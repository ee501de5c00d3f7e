"""What a finished run keeps for its page: interference, spectra, places of `A`, losses, agreement.

Read off adapters and statistics that are there; nothing is trained for it, and what a line says is
computed once (see `orthomerge.io.analyses` for the files).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from orthomerge import linalg
from orthomerge.adapters import Adapter, read_adapter
from orthomerge.diagnostics import interference
from orthomerge.experiment.distill import Distill
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.measured import Costs
from orthomerge.experiment.steps import (
    MERGE_GRANULARITY,
    AdapterStep,
    DistillStep,
    StatisticsStep,
    adapter_step,
    adapter_steps,
)
from orthomerge.experiment.steps.start import read_losses
from orthomerge.experiment.workspace import Workspace
from orthomerge.io.analyses import (
    Analyses,
    BandShares,
    Curve,
    Distillation,
    Disturbance,
    EnergySpectrum,
    Matrix,
    read_analyses,
    to_lines,
)
from orthomerge.io.files import fingerprint, holds, write_text
from orthomerge.io.names import MERGE, TRAINING
from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.moments import Moment, combine
from orthomerge.records import record_of
from orthomerge.statistics import Statistics

# At most so many layers have a spectrum, evenly chosen; a figure with more is not looked through.
LAYERS = 24
# Wider inputs without a factor have none: a full decomposition takes minutes a layer.
WIDEST = 2048
BANDS = 24
_POINTS = 64


class _Directions(NamedTuple):
    """Eigenvalues, descending, and the eigen-directions as columns; `width` may be larger."""

    values: Tensor
    vectors: Tensor
    width: int


class _Set(NamedTuple):
    """The adapters of an arm's seed."""

    arm: str
    seed: int
    rate: float


def keep_analyses(space: Workspace, rows: Sequence[ResultRow]) -> Costs:
    """Write the analyses of every arm and seed that `rows` are of, as far as adapters are there.

    Lines that are there already stay; lines of other adapters go. Places of `A` are kept of each
    arm's first seed. Returns what it took.
    """
    sets = list(
        dict.fromkeys(
            _Set(r.arm, r.seed, r.learning_rate)
            for r in rows
            if r.split == "test" and r.method == SINGLE
        )
    )
    before = read_analyses(space.exp.output)
    space.costs = costs = Costs()
    with costs.stage("evidence"):
        curves, disturbances = _of_sets(space, sets, before)
        first = list({each.arm: each for each in reversed(sets)}.values())[::-1]
        spectra, places = _of_layers(space, first, before)
        distilled = _of_distillations(space, sets, before)
    for kind, found in (
        (Curve, curves), (Disturbance, disturbances), (EnergySpectrum, spectra),
        (BandShares, places), (Distillation, distilled),
    ):  # fmt: skip
        path = space.exp.output / kind.FILE
        text = to_lines(found)
        if text and not holds(path, text):
            write_text(path, text)
    return costs


def _of_sets(
    space: Workspace, sets: Sequence[_Set], before: Analyses
) -> tuple[list[Curve], list[Disturbance]]:
    """Losses and interference of each arm and seed."""
    exp = space.exp
    curves = {c.key: c for c in before.curves}
    disturbances = {d.key: d for d in before.disturbances}
    wanted: list[str] = []
    for each in sets:
        steps = adapter_steps(exp, each.arm, each.seed, each.rate)
        keys = {task: exp.key(step) for task, step in steps.items()}
        statistics = StatisticsStep.for_merging(exp, each.arm)
        whole = fingerprint(["interference", list(keys.values()), _keys(exp, statistics)])
        wanted += [*keys.values(), whole]
        for task, step in steps.items():
            if keys[task] not in curves and (step.path(exp) / TRAINING).is_file():
                losses = read_losses(space.get(step))
                curves[keys[task]] = Curve(keys[task], each.arm, each.seed, task, each.rate, losses)
        if whole not in disturbances and all(s.path(exp).is_dir() for s in steps.values()):
            space.reporter.stage(f"interference of {each.arm} · seed {each.seed}")
            adapters = {task: read_adapter(space.get(step)) for task, step in steps.items()}
            moments = [space.get(step) for step in statistics.values()]
            disturbances[whole] = _disturbance(whole, each, adapters, moments)
    return (
        [curves[k] for k in wanted if k in curves],
        [disturbances[k] for k in wanted if k in disturbances],
    )


def _of_layers(
    space: Workspace, sets: Sequence[_Set], before: Analyses
) -> tuple[list[EnergySpectrum], list[BandShares]]:
    """Spectra of every task at the chosen layers, and where the arms' `A` lie in them.

    Arms with targets of their own are left out: they read other inputs than these.
    """
    exp = space.exp
    spectra = {s.key: s for s in before.spectra}
    places = {p.key: p for p in before.shares}
    moments = StatisticsStep.for_merging(exp)
    wanted: list[str] = []
    for task in exp.tasks:
        features = fingerprint(["spectrum", task, _keys(exp, moments)])
        steps: dict[_Set, AdapterStep] = {
            each: adapter_step(exp, each.arm, task, each.seed, each.rate)
            for each in sets
            if task in exp.tasks_of(each.arm) and not exp.recipe.arms[each.arm].targets
        }
        heads = {e: fingerprint(["place", exp.key(step), features]) for e, step in steps.items()}
        wanted += [features, *heads.values()]
        there = {k.split("/", 1)[0] for k in (*spectra, *places)}
        missing = {
            each: read_adapter(space.get(step))
            for each, step in steps.items()
            if heads[each] not in there and step.path(exp).is_dir()
        }
        if not missing:
            continue
        space.reporter.stage(f"spectra of {task}")
        statistics = {t: space.get(step) for t, step in moments.items()}
        for layer, own, others in _inputs(statistics, task, next(iter(missing.values())).layers):
            spectrum = _spectrum(f"{features}/{layer}", task, layer, own, others)
            spectra[spectrum.key] = spectrum
            for each, adapter in missing.items():
                if layer in adapter.layers:
                    A = adapter.layers[layer].A.double()
                    key = f"{heads[each]}/{layer}"
                    places[key] = _place(key, each, task, layer, A, own, others)
    return (
        [s for k, s in spectra.items() if k.split("/", 1)[0] in wanted],
        [p for k, p in places.items() if k.split("/", 1)[0] in wanted],
    )


def _of_distillations(
    space: Workspace, sets: Sequence[_Set], before: Analyses
) -> list[Distillation]:
    """What the record of every distilled merge says of its training."""
    exp, known = space.exp, {d.key: d for d in before.distillations}
    found: list[Distillation] = []
    for number, entry in enumerate(exp.recipe.merges):
        for weight in entry.weights if isinstance(entry, Distill) else ():
            for each in sets:
                step = DistillStep(*each, number, weight)
                if (key := exp.key(step)) in known:
                    found.append(known[key])
                elif step.path(exp).is_dir():
                    found.append(_distillation(key, each, step, exp))
    return found


def _distillation(key: str, of: _Set, step: DistillStep, exp: Experiment) -> Distillation:
    said = record_of(step.path(exp), MERGE)["distilled"]
    agreement = {m["step"]: m["agreement"] for m in said["measured"]}
    return Distillation(
        key=key,
        arm=of.arm,
        seed=of.seed,
        learning_rate=of.rate,
        weight=step.weight,
        options=step.how(exp).arguments,
        scale=said["from"]["scale"],
        texts=sum(t["count"] for t in said["texts"]),
        steps=max(agreement),
        best=said["best"],
        seconds=sum(said["seconds"].values()),
        before=agreement[0],
        after=agreement[said["best"]],
    )


def _keys(exp: Experiment, steps: Mapping[str, StatisticsStep]) -> list[str]:
    return [exp.key(step) for step in steps.values()]


def _disturbance(
    key: str, of: _Set, adapters: dict[str, Adapter], statistics: list[Statistics]
) -> Disturbance:
    found = interference(list(adapters.values()), statistics)
    return Disturbance(
        key=key,
        arm=of.arm,
        seed=of.seed,
        learning_rate=of.rate,
        granularity=MERGE_GRANULARITY,
        tasks=list(adapters),
        matrix=_finite(found.matrix),
        layers={name: _finite(values) for name, values in found.layers.items()},
    )


def _finite(matrix: Tensor) -> Matrix:
    rows = cast(list[list[float]], matrix.tolist())
    return [[v if math.isfinite(v) else None for v in row] for row in rows]


def _inputs(
    statistics: dict[str, Statistics], task: str, layers: Iterable[str]
) -> Iterator[tuple[str, _Directions, _Directions]]:
    """The chosen layers with the eigen-directions of a task's features and of the others'.

    Neighbouring layers that read one input share them.
    """
    last: Moment | None = None
    own = others = None
    for layer in _chosen(layers):
        moment = statistics[task].moment(layer)
        if moment is not last:
            last = moment
            rest = [s.moment(layer) for t, s in statistics.items() if t != task]
            own, others = _directions(moment), _directions(combine(rest))
        if own is not None and others is not None:
            yield layer, own, others


def _place(
    key: str, of: _Set, task: str, layer: str, A: Tensor, own: _Directions, others: _Directions
) -> BandShares:
    return BandShares(
        key=key,
        arm=of.arm,
        seed=of.seed,
        task=task,
        layer=layer,
        own=_bands(A, own),
        others=_bands(A, others),
        seen=[_seen(A, own), _seen(A, others)],
    )


def _chosen(layers: Iterable[str]) -> list[str]:
    names = list(layers)
    if len(names) <= LAYERS:
        return names
    step = len(names) / LAYERS
    return [names[int(i * step)] for i in range(LAYERS)]


def _directions(moment: Moment) -> _Directions | None:
    """The eigenpairs, through the factor where that is smaller; None where it would take long."""
    factor = moment.factor
    if factor is not None and factor.shape[0] < moment.dim:
        _, s, Vh = linalg.svd(factor.double(), full_matrices=False)
        return _Directions(s.square(), Vh.T, moment.dim)
    if moment.dim > WIDEST:
        return None
    values, vectors = linalg.eigh(moment.matrix)
    return _Directions(values.flip(0).clamp(min=0), vectors.flip(1), moment.dim)


def _spectrum(
    key: str, task: str, layer: str, own: _Directions, others: _Directions
) -> EnergySpectrum:
    known = min(len(own.values), len(others.values))
    first = list(range(1, min(known, 16) + 1))
    rest = torch.linspace(len(first), known, _POINTS - len(first)).round().int()
    places = sorted({*first, *cast(list[int], rest.tolist())})

    def parts(found: _Directions) -> list[float]:
        # A log axis has no zero; below this all is rounding.
        least, whole = torch.finfo(torch.float64).eps, float(found.values.sum()) or 1.0
        return [max(float(found.values[p - 1]) / whole, least) for p in places]

    return EnergySpectrum(key, task, layer, own.width, places, parts(own), parts(others))


def _bands(A: Tensor, found: _Directions) -> list[float]:
    """The part of `‖A‖²` in each band of directions; the last holds what no feature reaches."""
    energy = (A @ found.vectors).square().sum(dim=0)
    whole = float(A.square().sum()) or 1.0
    count = min(BANDS, found.width)
    edges = [round(i * found.width / count) for i in range(count + 1)]
    parts = [float(energy[a:b].sum()) / whole for a, b in pairwise(edges)]
    left = max(1 - sum(parts), 0.0)
    # Directions that no feature reaches have no order: spread over the bands they fill.
    known = len(found.values)
    if known < found.width:
        sizes = [max(b - max(a, known), 0) for a, b in pairwise(edges)]
        parts = [p + left * s / sum(sizes) for p, s in zip(parts, sizes, strict=True)]
    return parts


def _seen(A: Tensor, found: _Directions) -> float:
    """`tr(A S Aᵀ) d / (‖A‖² tr S)`: 1 for rows that lie anyhow."""
    norm = float(A.square().sum()) * float(found.values.sum())
    energy = float(((A @ found.vectors).square().sum(dim=0) * found.values).sum())
    return energy * found.width / norm if norm else 0.0
