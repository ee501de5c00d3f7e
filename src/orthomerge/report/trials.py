"""The page of a search for merge weights, from its `weights.json` alone."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import UndefinedError
from plotly.subplots import make_subplots  # pyright: ignore[reportUnknownVariableType]

from orthomerge.errors import OrthomergeError
from orthomerge.io.documents import read_json
from orthomerge.io.files import write_text
from orthomerge.report.style import INK, LIGHT, QUIET, SYMBOLS, colour, dress, safe
from orthomerge.report.templates import fill_with_figures, text_of

RECORD, PAGE = "weights.json", "trials.html"
# What a record of other values than ours lets go wrong, in the figures and in the page's template.
_BROKEN = (
    OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, ArithmeticError,
    UndefinedError,
)  # fmt: skip
_ABREAST = 4


def build_trials_page(folder: str | Path) -> Path:
    """Write `trials.html` beside the `weights.json` of `orthomerge tune`; no network is needed.

    Raises:
        OrthomergeError: there is no such record, or the page cannot be written.
    """
    file = Path(folder) / RECORD
    try:
        record = read_json(file)
        page = _render(Path(folder).resolve().name, record)
    except _BROKEN as problem:
        raise OrthomergeError(
            f"'{file}' cannot be read as the record of a search: make one with 'orthomerge tune'."
        ) from problem
    target = Path(folder) / PAGE
    write_text(target, page)
    return target


def trial_figure(record: dict[str, Any]) -> go.Figure:
    """The objective by trial with the running best; an entropy by step, with every task's own."""
    trials = record["trials"]
    numbers = [t["number"] for t in trials]
    figure = go.Figure()
    if record["objective"] == "entropy":
        # The last is over all rows; those before are over the batches of their step.
        for slot, task in enumerate(record["tasks"]):
            _line(figure, numbers, [t["tasks"][slot] for t in trials], task["name"], slot)
        _line(figure, numbers, [t["value"] for t in trials], "mean", INK, width=3)
        titles = ("step", "entropy, nats")
    else:
        values = [100 * t["value"] for t in trials]
        figure.add_scatter(
            x=numbers, y=values, mode="markers", name="trial", meta={"slot": 0},
            marker={"color": LIGHT[0], "size": 8}, text=[_hover(record, t) for t in trials],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=numbers, y=list(accumulate(values, max)), mode="lines", name="best so far",
            line={"color": LIGHT[1], "width": 2, "shape": "hv"}, meta={"slot": 1},
        )  # fmt: skip
        titles = ("trial", "mean score × 100")
    return _layout(figure, *titles, height=400)


def weights_figure(record: dict[str, Any]) -> go.Figure:
    """The score against each weight, a panel a weight; an entropy's coefficients by step."""
    labels, trials = record["labels"], record["trials"]
    if record["objective"] == "entropy":
        figure = go.Figure()
        numbers = [t["number"] for t in trials]
        for slot, label in enumerate(labels):
            _line(figure, numbers, [t["weights"][slot] for t in trials], label, slot)
        title = "coefficient, mean over layers" if record["layer_weights"] else "coefficient"
        return _layout(figure, "step", title, height=400)
    columns = min(_ABREAST, len(labels))
    rows = -(-len(labels) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, shared_yaxes=True, subplot_titles=[safe(x) for x in labels],
        vertical_spacing=0.25 / rows, horizontal_spacing=0.03,
    )  # fmt: skip
    best = next(t for t in trials if t["number"] == record["best"])
    for place, _ in enumerate(labels):
        where: dict[str, Any] = {"row": place // columns + 1, "col": place % columns + 1}
        for shown, slot, size, name in ((trials, 0, 7, "trial"), ([best], 1, 13, "best")):
            figure.add_scatter(
                x=[t["weights"][place] for t in shown], y=[100 * t["value"] for t in shown],
                mode="markers", name=name, showlegend=place == 0, legendgroup=name,
                marker={"color": LIGHT[slot], "size": size, "symbol": SYMBOLS[6 * slot]},
                text=[_hover(record, t) for t in shown], hovertemplate="%{text}<extra></extra>",
                meta={"slot": slot}, **where,
            )  # fmt: skip
    low, high = record["settings"]["low"], record["settings"]["high"]
    edge = 0.04 * (high - low)
    figure.update_xaxes(range=[low - edge, high + edge])
    return _layout(figure, "", "", height=120 + 230 * rows)


def _line(
    figure: go.Figure, x: list[int], y: list[float], name: str, slot: int, *, width: int = 2
) -> None:
    shade = QUIET if slot == INK else colour(slot)
    figure.add_scatter(
        x=x, y=y, mode="lines", name=safe(name), meta={"slot": slot},
        line={"color": shade, "width": width},
    )  # fmt: skip


def _layout(figure: go.Figure, x: str, y: str, *, height: int) -> go.Figure:
    dress(figure, "trials", "")
    figure.update_layout(
        margin={"t": 60, "b": 84},
        legend={"yref": "container", "y": 0, "yanchor": "bottom"},
        height=height,
    )
    if x:
        figure.update_layout(xaxis_title=x, yaxis_title=y)
    return figure


def _hover(record: dict[str, Any], trial: dict[str, Any]) -> str:
    lines = [f"<b>trial {trial['number']}</b>: {100 * trial['value']:.1f}"]
    names = [t["name"] for t in record["tasks"]]
    lines += [f"{safe(n)} {100 * v:.1f}" for n, v in zip(names, trial["tasks"], strict=True)]
    weights = zip(record["labels"], trial["weights"], strict=True)
    return "<br>".join([*lines, *(f"weight of {safe(n)} {w:.3f}" for n, w in weights)])


def _render(name: str, record: dict[str, Any]) -> str:
    entropy = record["objective"] == "entropy"
    ordered = sorted(record["trials"], key=lambda t: -t["value"])
    return fill_with_figures(
        text_of("trials.html"),
        {"trials": trial_figure(record), "weights": weights_figure(record)},
        name=name,
        record=record,
        entropy=entropy,
        best=next(t for t in record["trials"] if t["number"] == record["best"]),
        top=[] if entropy else ordered[:20],
        scale=1 if entropy else 100,
    )
