"""Figures and tables of the files next to a run's rows: interference, spectra, training losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go

from orthomerge.io.analyses import (
    Analyses,
    BandShares,
    Curve,
    Distillation,
    Disturbance,
    EnergySpectrum,
    Matrix,
)
from orthomerge.io.rows import DISTILL
from orthomerge.report.aggregate import merge_column
from orthomerge.report.style import (
    GRID,
    INK,
    MOST_BANDS,
    QUIET,
    SHADES,
    Group,
    band,
    dress,
    line,
    of_arm,
    safe,
    short_layer,
    slider,
)
from orthomerge.report.summary import ArmSummary, Column

_Of = TypeVar("_Of", Disturbance, Curve, Distillation)
ALL = "all layers"
_TOP = 2.0


def heatmap_figure(
    tasks: Sequence[str], matrix: Matrix, layers: Mapping[str, Matrix] | None = None
) -> go.Figure:
    """`I[i→j]`: row i is the adapter that disturbs, column j the task that is disturbed.

    A slider goes through `layers`. Colours end at 2, or lower where no entry is that large; the own
    adapter, 1 by definition, is left blank.
    """
    shown = {ALL: matrix} | {short_layer(k): v for k, v in (layers or {}).items()}
    names = [safe(t) for t in tasks]
    highest = max((v for m in shown.values() for v in _others(m) if v is not None), default=1.0)
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=_blank(matrix),
            customdata=_hover(matrix, names),
            zmin=0,
            zmax=min(max(highest, 0.5), _TOP),
            colorscale=SHADES["light"],
            texttemplate="%{z:.2f}" if len(names) <= 12 else None,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=True,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "I"}, "thickness": 12, "outlinewidth": 0},
            meta={"shades": SHADES},
        )
    )
    alt = (
        f"Heat map of {len(names)} adapters by {len(names)} tasks: how much each adapter adds to "
        "each task's output, relative to that task's own adapter. The mean of every arm is in the "
        "table."
    )
    dress(figure, "interference", alt)
    figure.update_xaxes(title={"text": "task that is disturbed"}, showgrid=False, tickangle=-35)
    figure.update_yaxes(
        title={"text": "adapter that disturbs"}, showgrid=False, autorange="reversed"
    )
    figure.update_layout(height=160 + 42 * len(names))
    if layers:
        steps = {
            label: {"z": [_blank(values)], "customdata": [_hover(values, names)]}
            for label, values in shown.items()
        }
        slider(figure, "layer", steps)
    return figure


def mean_disturbance(records: Sequence[Disturbance]) -> dict[str, Any]:
    """One arm's matrices over its seeds: means entry by entry, None where a seed has none.

    Seeds with other tasks than the first one's are left out.
    """
    first, *_ = records
    records = [r for r in records if r.tasks == first.tasks]

    def mean(matrices: list[Matrix]) -> Matrix:
        found: Any = np.mean(np.array(matrices, dtype=float), axis=0).tolist()
        return [[v if math.isfinite(v) else None for v in row] for row in found]

    layers = [name for name in first.layers if all(name in r.layers for r in records)]
    return {
        "tasks": first.tasks,
        "matrix": mean([r.matrix for r in records]),
        "layers": {name: mean([r.layers[name] for r in records]) for name in layers},
    }


def _others(matrix: Matrix) -> list[float | None]:
    """What is beside the diagonal."""
    return [v for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j]


def _blank(matrix: Matrix) -> Matrix:
    return [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(matrix)]


def _hover(matrix: Matrix, names: list[str]) -> list[list[str]]:
    def said(i: int, j: int) -> str:
        if i == j:
            return f"{names[i]}: its own adapter, 1 by definition"
        value = matrix[i][j]
        much = "without bound (its own adapter does nothing there)" if value is None else ""
        return f"<b>{names[i]} → {names[j]}</b><br>I = {much or f'{value:.3f}'}"

    return [[said(i, j) for j in range(len(names))] for i in range(len(names))]


def spectrum_figure(
    spectra: Sequence[EnergySpectrum], places: Sequence[BandShares], slots: Mapping[str, int]
) -> go.Figure:
    """One task: energies of the features above, the parts of every arm's `A` below.

    Above, eigenvalues as parts of their sum, of the task's own features and of the other tasks';
    below, the part of `‖A‖²` in each band of the others' eigen-directions, from the highest energy
    to the lowest. A slider goes through the layers of `spectra`. `slots` gives each arm its colour.
    """
    by_arm = {(p.arm, p.layer): p for p in places}
    arms = [a for a in slots if any(p.arm == a for p in places)]
    figure = go.Figure()
    steps = {short_layer(s.layer): _step(s, arms, by_arm) for s in spectra}
    first = next(iter(steps.values()))
    for place, (name, style) in enumerate((("others' features", "solid"), ("own features", "dot"))):
        figure.add_scatter(
            x=first["x"][place],
            y=first["y"][place],
            mode="lines",
            line={"color": QUIET, "width": 2, "dash": style},
            name=name,
            hovertemplate=f"{name}<br>direction %{{x}}: %{{y:.2e}} of the energy<extra></extra>",
            yaxis="y2",
            meta={"slot": INK},
        )
    for place, arm in enumerate(arms, start=2):
        figure.add_scatter(
            x=first["x"][place],
            y=first["y"][place],
            mode="lines",
            line={**line(slots[arm]), "shape": "hvh"},
            hovertemplate=f"<b>{safe(arm)}</b><br>%{{y:.1f}} % of A around direction %{{x:.0f}}"
            "<extra></extra>",
            **of_arm(arm, slots[arm]),
        )
    alt = (
        f"Two panels for the task {spectra[0].task} at one layer. Above, the energy of every "
        "eigen-direction of its own and of the other tasks' features, falling from the first to "
        f"the last; below, how much of A of each of {len(arms)} arms is along those directions. "
        "What an arm's A sees of the others is in the table."
    )
    dress(figure, "spectra", alt)
    figure.update_layout(
        height=520,
        xaxis={"title": {"text": "eigen-direction of the others' features, highest energy first"}},
        yaxis={"domain": [0, 0.52], "title": {"text": "% of A"}, "rangemode": "tozero"},
        yaxis2={
            "domain": [0.6, 1],
            "type": "log",
            "title": {"text": "part of energy"},
            "exponentformat": "power",
            "gridcolor": GRID,
            "zeroline": False,
            "automargin": True,
            "anchor": "x",
        },
    )
    if len(steps) > 1:
        slider(figure, "layer", steps)
    return figure


def _step(
    spectrum: EnergySpectrum, arms: Sequence[str], places: Mapping[tuple[str, str], BandShares]
) -> dict[str, Any]:
    """What the slider sets at one layer: x and y of every trace."""
    x: list[list[float]] = [list(spectrum.places), list(spectrum.places)]
    y: list[list[float]] = [spectrum.others, spectrum.own]
    for arm in arms:
        place = places.get((arm, spectrum.layer))
        parts = place.others if place else []
        width = spectrum.width / max(len(parts), 1)
        x.append([round((i + 0.5) * width, 1) for i in range(len(parts))])
        y.append([100 * part for part in parts])
    return {"x": x, "y": y}


def curve_figure(curves: Sequence[Curve], slots: Mapping[str, int]) -> go.Figure:
    """One task's training loss against the step, mean over seeds; bands go from lowest to highest.

    `slots` gives each arm its colour.
    """
    figure = go.Figure()
    arms = [a for a in slots if any(c.arm == a for c in curves)]
    for arm in arms:
        runs = [{int(step): loss for step, loss in c.losses} for c in curves if c.arm == arm]
        steps = sorted(set[int].intersection(*(set(r) for r in runs)))
        values = [[r[s] for r in runs] for s in steps]
        if len(runs) > 1 and len(arms) <= MOST_BANDS:
            low, high = [min(v) for v in values], [max(v) for v in values]
            band(figure, steps, low, high, slots[arm])
        figure.add_scatter(
            x=steps,
            y=[sum(v) / len(v) for v in values],
            mode="lines",
            line=line(slots[arm]),
            hovertemplate=f"<b>{safe(arm)}</b><br>step %{{x}}: loss %{{y:.3f}}<extra></extra>",
            **of_arm(arm, slots[arm]),
        )
    task = curves[0].task if curves else ""
    alt = (
        f"Training loss of the task {task} against the step, one line for each of {len(arms)} arms."
    )
    dress(figure, "training", alt)
    figure.update_layout(
        height=400,
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": "training loss"}, "rangemode": "tozero"},
    )
    return figure


# The page's sections ----------------------------------------------------------------------------


def analysis_groups(analyses: Analyses, arms: Sequence[ArmSummary]) -> dict[str, Group | None]:
    """Heat maps by arm, spectra and training losses by task; None where there is nothing."""
    slots = {a.name: a.slot for a in arms}
    maps = [(arm.name, heatmap_figure(**mean)) for arm, mean, _ in _means(analyses, arms)]
    spectra = [
        (
            task,
            spectrum_figure(
                [s for s in analyses.spectra if s.task == task],
                [p for p in analyses.shares if p.task == task],
                slots,
            ),
        )
        for task in _tasks(analyses.spectra)
    ]
    curves = [c for arm in arms for c in _current(analyses.curves, arm)]
    losses = [(t, curve_figure([c for c in curves if c.task == t], slots)) for t in _tasks(curves)]
    return {
        "interference": Group("arm", maps) if maps else None,
        "spectra": Group("task", spectra) if spectra else None,
        "curves": Group("task", losses) if losses else None,
    }


def interference_rows(analyses: Analyses, arms: Sequence[ArmSummary]) -> list[dict[str, Any]]:
    """Each arm's mean interference, and that of its largest pair; means over seeds."""
    rows: list[dict[str, Any]] = []
    for arm, found, seeds in _means(analyses, arms):
        tasks, matrix = found["tasks"], found["matrix"]
        pairs = [
            (value, tasks[i], tasks[j])
            for i, row in enumerate(matrix)
            for j, value in enumerate(row)
            if i != j and value is not None
        ]
        others = _others(matrix)
        mean = None if None in others or not pairs else sum(v for v, *_ in pairs) / len(pairs)
        worst = max(pairs, default=None)
        rows.append({"arm": arm, "mean": mean, "worst": worst, "seeds": seeds})
    return rows


def seen_rows(analyses: Analyses, arms: Sequence[ArmSummary]) -> list[dict[str, Any]]:
    """What each arm's `A` sees of its own and the others' features, means over tasks and layers."""
    rows: list[dict[str, Any]] = []
    for arm in arms:
        mine = [p for p in analyses.shares if p.arm == arm.name]
        if mine:
            own, others = (sum(p.seen[k] for p in mine) / len(mine) for k in (0, 1))
            rows.append({"arm": arm, "own": own, "others": others})
    return rows


def distilled_rows(analyses: Analyses, arms: Sequence[ArmSummary]) -> list[dict[str, Any]]:
    """Agreement and cost of each distilled merge of each arm; means over seeds."""
    rows: list[dict[str, Any]] = []
    for arm in arms:
        groups: dict[Column, list[Distillation]] = {}
        for each in _current(analyses.distillations, arm):
            groups.setdefault(merge_column(DISTILL, each.weight, each.options), []).append(each)
        for merge, mine in groups.items():
            tasks = {t: fmean(d.after[t] for d in mine) for t in mine[0].after}
            rows.append(
                {
                    "arm": arm,
                    "merge": merge,
                    "before": fmean(fmean(d.before.values()) for d in mine),
                    "after": fmean(tasks.values()),
                    "tasks": tasks,
                    "texts": round(fmean(d.texts for d in mine)),
                    "steps": max(d.steps for d in mine),
                    "best": round(fmean(d.best for d in mine)),
                    "seconds": fmean(d.seconds for d in mine),
                    "seeds": len(mine),
                }
            )
    return rows


def _means(
    analyses: Analyses, arms: Sequence[ArmSummary]
) -> list[tuple[ArmSummary, dict[str, Any], int]]:
    """The arms that there is interference of, with its mean and the number of seeds."""
    found = [(arm, _current(analyses.disturbances, arm)) for arm in arms]
    return [(arm, mean_disturbance(mine), len(mine)) for arm, mine in found if mine]


def _current(records: Iterable[_Of], arm: ArmSummary) -> list[_Of]:
    """An arm's records at the learning rate that it reports."""
    return [r for r in records if r.arm == arm.name and r.learning_rate == arm.learning_rate]


def _tasks(records: Iterable[EnergySpectrum | Curve]) -> list[str]:
    return list(dict.fromkeys(r.task for r in records))
