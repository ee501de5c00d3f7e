"""The training loss of every adapter of one task, a line an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from orthomerge.io.evidence import Curve
from orthomerge.report.style import MOST_BANDS, band, colour, dash, dress, safe


def curve_figure(curves: Sequence[Curve], slots: Mapping[str, int]) -> go.Figure:
    """Mean loss over seeds against the step; the band goes from the lowest to the highest seed.

    `curves` are those of one task; `slots` gives each arm its colour.
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
            line={"color": colour(slots[arm]), "width": 2, "dash": dash(slots[arm])},
            name=safe(arm),
            legendgroup=str(slots[arm]),
            hovertemplate=f"<b>{safe(arm)}</b><br>step %{{x}}: loss %{{y:.3f}}<extra></extra>",
            meta={"slot": slots[arm]},
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
