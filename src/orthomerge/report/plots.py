"""Figures of a run or of a diagnosis, as Plotly figures for a notebook or a page of one's own.

    orthomerge.report.plots.weight_curve("runs/demo").show()
    orthomerge.report.plots.interference_heatmap(orthomerge.interference(adapters, statistics))

They are the figures of the report's page. A run is named by its folder; rows that were read already
and, for the heat map, what `orthomerge.interference` returns, will do as well. No model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from orthomerge.errors import OrthomergeError, unknown_name
from orthomerge.io.analyses import Matrix, read_analyses
from orthomerge.io.rows import ResultRow, read_rows
from orthomerge.report.aggregate import summarize
from orthomerge.report.analyses import (
    curve_figure,
    heatmap_figure,
    mean_disturbance,
    spectrum_figure,
)
from orthomerge.report.figures import task_figure, weight_figure
from orthomerge.report.source import ROWS
from orthomerge.report.summary import Column, Summary

__all__ = ["interference_heatmap", "spectrum", "task_bars", "training_curves", "weight_curve"]

Run = str | Path
Scores = Run | Summary | Iterable[ResultRow]


def weight_curve(scores: Scores) -> go.Figure:
    """Mean score of every arm against the weight of the plain sum, the adapters alone beside it.

    `scores` is a run's folder, its rows, or what `orthomerge.report.summarize` makes of them.

    Raises:
        OrthomergeError: the folder holds no rows.
    """
    return weight_figure(_summary(scores))


def task_bars(scores: Scores, method: str | None = None, weight: float | None = None) -> go.Figure:
    """Every task's score after one merge as bars, an arm a colour; ticks mark the adapters alone.

    The merge is the plain sum at weight 1, or the closest to it, unless `method` and `weight` name
    another.

    Raises:
        OrthomergeError: the folder holds no rows.
        UnknownNameError: no such merge among them.
    """
    summary = _summary(scores)
    if method is None and weight is None:
        return task_figure(summary)

    def fits(column: Column) -> bool:
        return method in (None, column.method) and weight in (None, column.weight)

    found = [c for c in summary.merges if fits(c)]
    if not found:
        asked = " × ".join(str(v) for v in (method, weight) if v is not None)
        raise unknown_name("merge", asked, [c.label for c in summary.merges])
    return task_figure(summary, found[0])


def interference_heatmap(source: Any, arm: str | None = None) -> go.Figure:
    """Which adapter disturbs which task: `I[i→j]`, adapters down, tasks across, a slider of layers.

    `source` is what `orthomerge.interference` returns (anything with `names`, `matrix [n, n]` and
    `layers`), or a run's folder; of a run it is the mean over the seeds of `arm`, by default of the
    first one.

    Raises:
        OrthomergeError: the run keeps no interference.
        UnknownNameError: no such arm in it.
    """
    if not isinstance(source, str | Path):
        layers = {name: _plain(values) for name, values in source.layers.items()}
        return heatmap_figure(source.names, _plain(source.matrix), layers)
    records = _needed(read_analyses(source).disturbances, source, "interference")
    name = _one_of(arm, [r.arm for r in records], "arm")
    mean = mean_disturbance([r for r in records if r.arm == name])
    return heatmap_figure(mean["tasks"], mean["matrix"], mean["layers"])


def spectrum(run: Run, task: str | None = None, layer: str | None = None) -> go.Figure:
    """The energy of a task's features over their eigen-directions, and where each arm's `A` is.

    `task` is by default the run's first; without `layer` a slider goes through the layers.

    Raises:
        OrthomergeError: the run keeps no spectra.
        UnknownNameError: no such task or layer in it.
    """
    analyses = read_analyses(run)
    spectra = _needed(analyses.spectra, run, "spectra")
    name = _one_of(task, [s.task for s in spectra], "task")
    mine = [s for s in spectra if s.task == name]
    if layer is not None:
        chosen = _one_of(layer, [s.layer for s in mine], "layer")
        mine = [s for s in mine if s.layer == chosen]
    places = [p for p in analyses.shares if p.task == name]
    return spectrum_figure(mine, places, _slots(p.arm for p in analyses.shares))


def training_curves(run: Run, task: str | None = None) -> go.Figure:
    """The training loss of every arm's adapter of one task, by default the run's first.

    Lines are means over seeds, bands go from the lowest seed to the highest.

    Raises:
        OrthomergeError: the run keeps no losses.
        UnknownNameError: no such task in it.
    """
    curves = _needed(read_analyses(run).curves, run, "training losses")
    name = _one_of(task, [c.task for c in curves], "task")
    return curve_figure([c for c in curves if c.task == name], _slots(c.arm for c in curves))


def _summary(scores: Scores) -> Summary:
    if isinstance(scores, Summary):
        return scores
    if isinstance(scores, str | Path):
        return summarize(read_rows(Path(scores) / ROWS))
    return summarize(scores)


def _slots(arms: Iterable[str]) -> dict[str, int]:
    return {arm: place for place, arm in enumerate(dict.fromkeys(arms))}


def _needed(records: list[Any], run: Run, what: str) -> list[Any]:
    if not records:
        raise OrthomergeError(
            f"'{run}' keeps no {what}: run its recipe again, which adds them where the adapters "
            "are still there."
        )
    return records


def _one_of(name: str | None, names: Iterable[str], kind: str) -> str:
    found = list(dict.fromkeys(names))
    if name is None:
        return found[0]
    if name not in found:
        raise unknown_name(kind, name, found)
    return name


def _plain(matrix: Any) -> Matrix:
    """A tensor or nested lists as lists, infinity as None."""
    rows = matrix.tolist() if hasattr(matrix, "tolist") else matrix
    return [[float(v) if math.isfinite(v) else None for v in row] for row in rows]
