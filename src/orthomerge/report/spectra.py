"""The spectrum of the features at a layer's input, and where each arm's `A` lies in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from orthomerge.io.evidence import Place, Spectrum
from orthomerge.report.style import INK, QUIET, colour, dash, dress, safe, short_layer, slider


def spectrum_figure(
    spectra: Sequence[Spectrum], places: Sequence[Place], slots: Mapping[str, int]
) -> go.Figure:
    """One task: energies of the features above, the parts of every arm's `A` below.

    Above, eigenvalues as parts of their sum, of the task's own features and of the other tasks';
    below, the part of `‖A‖²` in each band of the others' eigen-directions, from the loudest to the
    quietest. A slider goes through the layers of `spectra`. `slots` gives each arm its colour.
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
        slot = slots[arm]
        figure.add_scatter(
            x=first["x"][place],
            y=first["y"][place],
            mode="lines",
            line={"color": colour(slot), "width": 2, "dash": dash(slot), "shape": "hvh"},
            name=safe(arm),
            legendgroup=str(slot),
            hovertemplate=f"<b>{safe(arm)}</b><br>%{{y:.1f}} % of A around direction %{{x:.0f}}"
            "<extra></extra>",
            meta={"slot": slot},
        )
    _frame(figure, spectra[0].task, arms)
    if len(steps) > 1:
        slider(figure, "layer", steps)
    return figure


def _step(
    spectrum: Spectrum, arms: Sequence[str], places: Mapping[tuple[str, str], Place]
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


def _frame(figure: go.Figure, task: str, arms: Sequence[str]) -> None:
    alt = (
        f"Two panels for the task {task} at one layer. Above, the energy of every eigen-direction "
        "of its own and of the other tasks' features, falling from the first to the last; below, "
        f"how much of A of each of {len(arms)} arms lies along those directions. What an arm's A "
        "sees of the others is in the table."
    )
    dress(figure, "spectra", alt)
    figure.update_layout(
        height=520,
        xaxis={"title": {"text": "eigen-direction of the others' features, loudest first"}},
        yaxis={"domain": [0, 0.52], "title": {"text": "% of A"}, "rangemode": "tozero"},
        yaxis2={
            "domain": [0.6, 1],
            "type": "log",
            "title": {"text": "part of energy"},
            "exponentformat": "power",
            "gridcolor": "#e3e7eb",
            "zeroline": False,
            "automargin": True,
            "anchor": "x",
        },
    )
