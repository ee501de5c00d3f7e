"""The heat map of interference: which adapter disturbs which task, over all layers or in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from orthomerge.io.evidence import Disturbance, Matrix
from orthomerge.report.style import SHADES, dress, safe, short_layer, slider

ALL = "all layers"
_TOP = 2.0


def heatmap_figure(
    tasks: Sequence[str], matrix: Matrix, layers: Mapping[str, Matrix] | None = None
) -> go.Figure:
    """`I[i→j]`: row i is the adapter that disturbs, column j the task that is disturbed.

    A slider goes through `layers`. Colours end at 2, or lower where nothing is that loud; the own
    adapter, 1 by definition, is left blank.
    """
    shown = {ALL: matrix} | {short_layer(k): v for k, v in (layers or {}).items()}
    names = [safe(t) for t in tasks]
    figure = go.Figure(_map(names, shown))
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


def _map(names: list[str], shown: Mapping[str, Matrix]) -> go.Heatmap:
    """The first of `shown`, in colours that hold for all of them."""
    matrix = shown[ALL]
    loudest = max((v for m in shown.values() for v in _others(m)), default=1.0)
    return go.Heatmap(
        x=names,
        y=names,
        z=_blank(matrix),
        customdata=_hover(matrix, names),
        zmin=0,
        zmax=min(max(loudest, 0.5), _TOP),
        colorscale=SHADES["light"],
        texttemplate="%{z:.2f}" if len(names) <= 12 else None,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=True,
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "I"}, "thickness": 12, "outlinewidth": 0},
        meta={"shades": SHADES},
    )


def mean_disturbance(records: Sequence[Disturbance]) -> dict[str, Any]:
    """One arm's matrices over its seeds: means entry by entry, None where a seed has none.

    Seeds with other tasks than the first one's are left out.
    """
    records = [r for r in records if r.tasks == records[0].tasks]

    def mean(matrices: list[Matrix]) -> Matrix:
        return [
            [_mean([m[i][j] for m in matrices]) for j in range(len(matrices[0]))]
            for i in range(len(matrices[0]))
        ]

    layers = [name for name in records[0].layers if all(name in r.layers for r in records)]
    return {
        "tasks": records[0].tasks,
        "matrix": mean([r.matrix for r in records]),
        "layers": {name: mean([r.layers[name] for r in records]) for name in layers},
    }


def overall(matrix: Matrix) -> float | None:
    """The mean of what is beside the diagonal; None where something is infinite, or nothing is."""
    size = len(matrix)
    return _mean([matrix[i][j] for i in range(size) for j in range(size) if i != j])


def _others(matrix: Matrix) -> list[float]:
    return [
        v for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and v is not None
    ]


def _mean(values: list[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found and len(found) == len(values) else None


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
