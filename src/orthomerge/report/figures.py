"""The figures of scores: against the merge weight, and task by task."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from orthomerge.io.rows import SINGLE
from orthomerge.report.style import (
    GRID,
    INK,
    LIGHT,
    MOST_BANDS,
    band,
    colour,
    dress,
    line,
    of_arm,
    safe,
    symbol,
)
from orthomerge.report.summary import PLAIN, ArmSummary, Column, Score, Summary, percent

_FLOOR = {"dash": "dot", "width": 1.5, "color": LIGHT[7]}
"""The line of what a constant answer scores."""


def _hover(arm: ArmSummary, column: Column, score: Score, retained: float | None = None) -> str:
    lines = [f"<b>{safe(arm.name)}</b>", f"{safe(column.label)}: {score}"]
    if retained is not None and column.method != SINGLE:
        lines.append(f"{percent(retained)} % of its single-task score")
    seeds = len(score.seeds)
    lines.append(f"{seeds} seed{'' if seeds == 1 else 's'}")
    return "<br>".join(lines)


def _bars(scores: list[Score], slot: int) -> dict[str, Any] | None:
    """Error bars, where more than one seed is behind any of the scores."""
    if all(s.spread is None for s in scores):
        return None
    spreads = [100 * (s.spread or 0.0) for s in scores]
    return {"type": "data", "array": spreads, "color": colour(slot), "thickness": 1.2, "width": 3}


def weight_figure(summary: Summary) -> go.Figure:
    """Mean score against the weight of the plain sum, a line an arm; singles in a panel beside."""
    sums = _sums(summary)
    weights = sorted({c.weight for c in sums if c.weight is not None})
    varied = {a.name for a in summary.arms for c in sums if _varies(summary.cell(a, c).score)}
    figure = go.Figure()
    for place, arm in enumerate(summary.arms):
        shown = [c for c in sums if summary.cell(arm, c).score]
        middle = (place + 0.5) / len(summary.arms)
        _add_alone(figure, summary, arm, middle, named=not shown)
        if shown:
            _add_sums(figure, summary, arm, shown, banded=len(varied) <= MOST_BANDS)
    alt = (
        f"Mean score over {len(summary.tasks)} tasks against the merge weight, one line for each "
        f"of {len(summary.arms)} arms; the panel on the left shows each task's own adapter alone. "
        "The numbers are in the table above."
    )
    dress(figure, "score-by-weight", alt)
    _two_panels(figure, weights)
    if summary.floor is not None:
        _add_floor(figure, 100 * summary.floor, (_edge(weights, 0), _edge(weights, 1)))
    return figure


def _sums(summary: Summary) -> list[Column]:
    """The plain sum at every weight, with the options of the one that is spoken of first."""
    plain = summary.plain
    options = plain.options if plain and plain.method == PLAIN else ""
    sums = [c for c in summary.columns if c.method == PLAIN and c.options == options]
    return [c for c in sums if c.weight is not None]


def _add_alone(
    figure: go.Figure, summary: Summary, arm: ArmSummary, place: float, *, named: bool
) -> None:
    """An arm's own adapters, a point in the panel on the left."""
    own = summary.cell(arm, summary.single).score
    if own is None:
        return
    figure.add_scatter(
        x=[place],
        y=[100 * own.mean],
        error_y=_bars([own], arm.slot),
        mode="markers",
        marker=_marker(arm),
        showlegend=named,
        text=[_hover(arm, summary.single, own)],
        hovertemplate="%{text}<extra></extra>",
        **of_arm(arm.name, arm.slot),
    )


def _add_sums(
    figure: go.Figure, summary: Summary, arm: ArmSummary, columns: list[Column], *, banded: bool
) -> None:
    """An arm's sums by weight as a line; the spread as a band, or as bars where bands are many."""
    cells = [(c, summary.cell(arm, c)) for c in columns]
    scores = [cell.score for _, cell in cells if cell.score]
    places = [c.weight for c in columns if c.weight is not None]
    bars = _bars(scores, arm.slot)
    if bars and banded:
        bars = None
        low = [100 * (s.mean - (s.spread or 0)) for s in scores]
        high = [100 * (s.mean + (s.spread or 0)) for s in scores]
        band(figure, places, low, high, arm.slot, xaxis="x2")
    signs = [symbol(arm.slot) + ("-open" if summary.short(arm, s) else "") for s in scores]
    figure.add_scatter(
        x=places,
        y=[100 * s.mean for s in scores],
        error_y=bars,
        mode="lines+markers",
        line=line(arm.slot),
        marker={**_marker(arm), "symbol": signs},
        text=[_hover(arm, c, cell.score, cell.retained) for c, cell in cells if cell.score],
        hovertemplate="%{text}<extra></extra>",
        xaxis="x2",
        **of_arm(arm.name, arm.slot),
    )


def _two_panels(figure: go.Figure, weights: list[float]) -> None:
    """The axes: own adapters on the left without a scale, weights on the right."""
    figure.update_layout(
        xaxis={
            "domain": [0, 0.2],
            "range": [-0.05, 1.05],
            "showgrid": False,
            "tickvals": [0.5],
            "ticktext": ["alone"],
            "fixedrange": True,
        },
        xaxis2={
            "domain": [0.23, 1],
            "tickvals": weights,
            "ticktext": [f"{w:g}" for w in weights],
            "title": {"text": "weight of every update in the sum"},
            "gridcolor": GRID,
            "zeroline": False,
        },
        yaxis={"title": {"text": "mean score × 100"}},
        height=460,
    )


def _add_floor(figure: go.Figure, floor: float, edges: tuple[float, float]) -> None:
    """The constant answer's score across both panels."""
    for (first, last), axis in (((-0.05, 1.05), "x"), (edges, "x2")):
        figure.add_scatter(
            x=[first, last],
            y=[floor, floor],
            xaxis=axis,
            mode="lines",
            line=_FLOOR,
            name="constant answer",
            legendgroup="floor",
            showlegend=axis == "x2",
            hovertemplate=f"constant answer: {floor:.1f}<extra></extra>",
            meta={"slot": INK},
        )
    figure.update_layout(xaxis2_range=list(edges), xaxis_range=[-0.05, 1.05])


def _marker(arm: ArmSummary) -> dict[str, Any]:
    return {"color": colour(arm.slot), "symbol": symbol(arm.slot), "size": 8}


def _varies(score: Score | None) -> bool:
    return score is not None and bool(score.spread)


def _edge(weights: list[float], side: int) -> float:
    """The ends of the weight axis, a little outside the weights."""
    if not weights:
        return float(side)
    margin = 0.05 * (weights[-1] - weights[0]) or 0.1
    return weights[-1] + margin if side else weights[0] - margin


def task_figure(summary: Summary, column: Column | None = None) -> go.Figure:
    """Every task's score after the merge `column` (the plain sum) as bars, singles as ticks."""
    column = column or summary.plain
    figure = go.Figure()
    for arm in summary.arms:
        merged = _by_task(summary, arm, column) if column else None
        if merged:
            _add_bars(figure, arm, *merged)
        if alone := _by_task(summary, arm, summary.single):
            _add_ticks(figure, arm, *alone, named=not merged)
    what = column.label if column else "own adapters"
    alt = (
        f"Score of each of {len(summary.tasks)} tasks under {what}, one bar for each of "
        f"{len(summary.arms)} arms; a tick marks the task's own adapter alone, a dotted line a "
        "constant answer. The numbers are in the table."
    )
    dress(figure, "score-by-task", alt)
    labels = [safe(t) for t in summary.tasks]
    figure.update_layout(
        barmode="group",
        scattermode="group",
        bargap=0.14,
        bargroupgap=0.08,
        scattergap=0.14,
        shapes=_floors(summary),
        height=440,
        yaxis={"title": {"text": "score × 100"}},
        xaxis={"categoryorder": "array", "categoryarray": labels, "showgrid": False},
    )
    return figure


def _by_task(
    summary: Summary, arm: ArmSummary, column: Column
) -> tuple[dict[str, Any], list[Score]] | None:
    """What a trace of an arm's scores by task has, and the scores; None where there are none."""
    found = {safe(t): summary.per_task.get((arm.name, column, t)) for t in summary.tasks}
    scored = {label: score for label, score in found.items() if score is not None}
    if not scored:
        return None
    trace: dict[str, Any] = {
        "x": list(scored),
        "y": [100 * s.mean for s in scored.values()],
        "text": [f"{label}<br>{_hover(arm, column, s)}" for label, s in scored.items()],
        "hovertemplate": "%{text}<extra></extra>",
        "offsetgroup": str(arm.slot),
        **of_arm(arm.name, arm.slot),
    }
    return trace, list(scored.values())


def _add_bars(
    figure: go.Figure, arm: ArmSummary, trace: dict[str, Any], scores: list[Score]
) -> None:
    pattern = {"shape": "/" if arm.slot >= len(LIGHT) else "", "solidity": 0.35}
    figure.add_bar(
        **trace,
        marker={"color": colour(arm.slot), "pattern": pattern},
        error_y=_bars(scores, arm.slot),
        textposition="none",
    )


def _add_ticks(
    figure: go.Figure, arm: ArmSummary, trace: dict[str, Any], scores: list[Score], *, named: bool
) -> None:
    shade = colour(arm.slot)
    figure.add_scatter(
        **trace,
        mode="markers",
        showlegend=named,
        marker={
            "symbol": "line-ew-open",
            "size": 11,
            "color": shade,
            "line": {"width": 2, "color": shade},
        },
    )


def _floors(summary: Summary) -> list[dict[str, Any]]:
    """A dotted line over each task's bars at what a constant answer scores."""
    return [
        {
            "type": "line",
            "x0": place - 0.46,
            "x1": place + 0.46,
            "y0": 100 * value,
            "y1": 100 * value,
            "line": _FLOOR,
        }
        for place, task in enumerate(summary.tasks)
        if (value := summary.majority.get(task)) is not None
    ]
