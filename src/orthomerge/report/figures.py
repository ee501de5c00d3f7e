"""The figures of scores: against the merge weight, and task by task."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from orthomerge.report.style import INK, LIGHT, MOST_BANDS, band, colour, dash, dress, safe, symbol
from orthomerge.report.tables import PLAIN, Arm, Column, Score, Summary, percent
from orthomerge.rows import SINGLE


def _hover(arm: Arm, column: Column, score: Score, retained: float | None = None) -> str:
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
    plain = summary.plain
    options = plain.options if plain and plain.method == PLAIN else ""
    sums = [c for c in summary.columns if c.method == PLAIN and c.options == options]
    sums = [c for c in sums if c.weight is not None]
    figure = go.Figure()
    count = max(len(summary.arms), 1)
    varied = {a.name for a in summary.arms for c in sums if _varies(summary.cell(a, c).score)}
    crowded = len(varied)
    for place, arm in enumerate(summary.arms):
        slot, name = arm.slot, safe(arm.name)
        marker = {"color": colour(slot), "symbol": symbol(slot), "size": 8}
        own = summary.cell(arm, summary.single).score
        shown = [(c, cell, cell.score) for c in sums if (cell := summary.cell(arm, c)).score]
        if own is not None:
            figure.add_scatter(
                x=[(place + 0.5) / count],
                y=[100 * own.mean],
                error_y=_bars([own], slot),
                mode="markers",
                marker=marker,
                name=name,
                legendgroup=str(slot),
                showlegend=not shown,
                text=[_hover(arm, summary.single, own)],
                hovertemplate="%{text}<extra></extra>",
                meta={"slot": slot},
            )
        scores = [s for _, _, s in shown]
        if scores:
            places = [c.weight for c, _, _ in shown if c.weight is not None]
            bars = _bars(scores, slot)
            if bars and crowded <= MOST_BANDS:
                bars = None
                low = [100 * (s.mean - (s.spread or 0)) for s in scores]
                high = [100 * (s.mean + (s.spread or 0)) for s in scores]
                band(figure, places, low, high, slot, xaxis="x2")
            figure.add_scatter(
                x=places,
                y=[100 * s.mean for s in scores],
                error_y=bars,
                mode="lines+markers",
                line={"color": colour(slot), "width": 2, "dash": dash(slot)},
                marker={
                    **marker,
                    "symbol": [
                        symbol(slot) + ("-open" if summary.short(arm, s) else "") for s in scores
                    ],
                },
                name=name,
                legendgroup=str(slot),
                text=[_hover(arm, c, s, cell.retained) for c, cell, s in shown if s],
                hovertemplate="%{text}<extra></extra>",
                xaxis="x2",
                meta={"slot": slot},
            )
    weights = sorted({c.weight for c in sums if c.weight is not None})
    alt = (
        f"Mean score over {len(summary.tasks)} tasks against the merge weight, one line for each "
        f"of {len(summary.arms)} arms; the panel on the left shows each task's own adapter alone. "
        "The numbers are in the table above."
    )
    dress(figure, "score-by-weight", alt)
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
            "gridcolor": "#e3e7eb",
            "zeroline": False,
        },
        yaxis={"title": {"text": "mean score × 100"}},
        height=460,
    )
    if summary.floor is not None:
        floor = 100 * summary.floor
        line = {"dash": "dot", "width": 1.5, "color": "#5c6770"}
        for first, last, axis in ((-0.05, 1.05, "x"), (_edge(weights, 0), _edge(weights, 1), "x2")):
            figure.add_scatter(
                x=[first, last],
                y=[floor, floor],
                xaxis=axis,
                mode="lines",
                line=line,
                name="constant answer",
                legendgroup="floor",
                showlegend=axis == "x2",
                hovertemplate=f"constant answer: {floor:.1f}<extra></extra>",
                meta={"slot": INK},
            )
        figure.update_layout(
            xaxis2_range=[_edge(weights, 0), _edge(weights, 1)], xaxis_range=[-0.05, 1.05]
        )
    return figure


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
    labels = [safe(t) for t in summary.tasks]
    for arm in summary.arms:
        slot, name = arm.slot, safe(arm.name)
        group = str(slot)
        named = False
        for kind, used in (("bar", column), ("tick", summary.single)):
            if used is None:
                continue
            scored = [
                (label, score)
                for label, task in zip(labels, summary.tasks, strict=True)
                if (score := summary.per_task.get((arm.name, used, task))) is not None
            ]
            if not scored:
                continue
            common: dict[str, Any] = {
                "x": [label for label, _ in scored],
                "y": [100 * s.mean for _, s in scored],
                "text": [f"{label}<br>{_hover(arm, used, s)}" for label, s in scored],
                "hovertemplate": "%{text}<extra></extra>",
                "offsetgroup": group,
                "legendgroup": group,
                "name": name,
                "meta": {"slot": slot},
            }
            if kind == "bar":
                pattern = {"shape": "/" if slot >= len(LIGHT) else "", "solidity": 0.35}
                figure.add_bar(
                    **common,
                    marker={"color": colour(slot), "pattern": pattern},
                    error_y=_bars([s for _, s in scored], slot),
                    textposition="none",
                )
                named = True
            else:
                figure.add_scatter(
                    **common,
                    mode="markers",
                    showlegend=not named,
                    marker={
                        "symbol": "line-ew-open",
                        "size": 11,
                        "color": colour(slot),
                        "line": {"width": 2, "color": colour(slot)},
                    },
                )
    floors = [
        (label, summary.majority.get(t)) for label, t in zip(labels, summary.tasks, strict=True)
    ]
    shapes = [
        {
            "type": "line",
            "x0": place - 0.46,
            "x1": place + 0.46,
            "y0": 100 * value,
            "y1": 100 * value,
            "line": {"dash": "dot", "width": 1.5, "color": "#5c6770"},
        }
        for place, (_, value) in enumerate(floors)
        if value is not None
    ]
    what = column.label if column else "own adapters"
    alt = (
        f"Score of each of {len(summary.tasks)} tasks under {what}, one bar for each of "
        f"{len(summary.arms)} arms; a tick marks the task's own adapter alone, a dotted line a "
        "constant answer. The numbers are in the table."
    )
    dress(figure, "score-by-task", alt)
    figure.update_layout(
        barmode="group",
        scattermode="group",
        bargap=0.14,
        bargroupgap=0.08,
        scattergap=0.14,
        shapes=shapes,
        height=440,
        yaxis={"title": {"text": "score × 100"}},
        xaxis={"categoryorder": "array", "categoryarray": labels, "showgrid": False},
    )
    return figure
