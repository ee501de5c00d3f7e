"""How every figure looks: one colour and one marker for an arm wherever it appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import plotly.graph_objects as go

# Distinct under every common colour blindness; at least 4.5:1 against the page of their theme.
LIGHT = ["#0068a8", "#b84a00", "#00735a", "#a03d86", "#7d6100", "#5a45b0", "#a3263b", "#5c6770"]
DARK = ["#5cb8f0", "#ff9d5c", "#3ecf9f", "#ef9fd6", "#e6c74f", "#b7a6ff", "#ff8d97", "#b6c0c9"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "x", "star", "hexagon"]
DASHES = ["solid", "dash", "dot", "dashdot"]
INK = -1
"""The slot of a trace that is no arm's: it takes the colour of the text."""
GRID, QUIET = "#e3e7eb", "#57616b"
# A pair near zero keeps the colour of the page, a large one stands out.
SHADES = {
    "light": [[0, "#ffffff"], [0.5, "#e9a26b"], [1, "#8a2f00"]],
    "dark": [[0, "#181d23"], [0.5, "#6e3a1c"], [1, "#c2571a"]],
}
MOST_BANDS = 6
"""Bands of more arms than this cover each other."""
BAND = 0.14
"""How strongly the band around a line is filled."""


def colour(slot: int, *, dark: bool = False) -> str:
    """The colour of an arm's slot; the ninth arm takes the first's, with another marker."""
    palette = DARK if dark else LIGHT
    return palette[slot % len(palette)]


def symbol(slot: int) -> str:
    """The marker of an arm's slot: after eight arms no colour meets the same marker again."""
    return SYMBOLS[(slot + 3 * (slot // len(LIGHT))) % len(SYMBOLS)]


def dash(slot: int) -> str:
    """The dash of an arm's slot: solid for the first eight."""
    return DASHES[(slot // len(LIGHT)) % len(DASHES)]


def line(slot: int) -> dict[str, Any]:
    """The line of an arm's slot."""
    return {"color": colour(slot), "width": 2, "dash": dash(slot)}


def of_arm(name: str, slot: int) -> dict[str, Any]:
    """What every trace of an arm has, so that it comes and goes with its entry in the legend."""
    return {"name": safe(name), "legendgroup": str(slot), "meta": {"slot": slot}}


def safe(text: str) -> str:
    """Plotly reads names as a little HTML."""
    return escape(text, quote=False)


def band(
    figure: go.Figure,
    x: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    slot: int,
    **more: Any,
) -> None:
    """Fill what is between two lines in an arm's colour; it comes and goes with the arm."""
    shade = colour(slot)
    red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},{BAND})",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=str(slot),
        meta={"slot": slot, "band": True},
        **more,
    )


def dress(figure: go.Figure, name: str, alt: str) -> go.Figure:
    """The common layout; `alt` says in words what is drawn, `name` is that of a download."""
    figure.update_layout(
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1b2026"},
        paper_bgcolor="#ffffff",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 16, "t": 36, "b": 48},
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "yanchor": "top", "y": -0.2},
        meta={"name": name, "alt": alt},
    )
    # Marks that are not seen hold the two axes' numbers apart where they meet.
    marks: dict[str, Any] = {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True, **marks)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True, **marks)
    return figure


def slider(figure: go.Figure, what: str, steps: dict[str, dict[str, Any]]) -> None:
    """A slider that restyles every trace; `steps` maps a label to the arguments of the restyling.

    In a notebook Plotly draws it; the page draws one of its own that a keyboard moves too.
    """
    figure.update_layout(
        sliders=[
            {
                "currentvalue": {"prefix": f"{what}: "},
                "pad": {"t": 40},
                "steps": [
                    {"label": label, "method": "restyle", "args": [change]}
                    for label, change in steps.items()
                ],
            }
        ]
    )


@dataclass(frozen=True)
class Group:
    """Figures in one place of the page, shown one at a time; `choice` distinguishes them."""

    choice: str
    figures: list[tuple[str, go.Figure]]

    @property
    def alt(self) -> str:
        """What the first of them shows, in words."""
        return str(self._layout()["meta"]["alt"])

    @property
    def labels(self) -> list[str]:
        """What there is to choose from."""
        return [label for label, _ in self.figures]

    @property
    def steps(self) -> list[str]:
        """The places of the figures' slider; empty where they have none."""
        sliders = self._layout().get("sliders", [])
        return [str(step["label"]) for s in sliders for step in s["steps"]]

    def _layout(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.figures[0][1].to_dict())["layout"]


def short_layer(name: str) -> str:
    """A layer's name without what every layer's has."""
    parts = [p for p in name.split(".") if p not in ("base_model", "model", "bert", "roberta")]
    kept = [p for p in parts if p not in ("encoder", "layer", "layers", "attention")]
    return safe(".".join(kept or parts))
