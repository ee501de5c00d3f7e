"""How every page is filled in: one environment, one frame, and what each page carries in itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from orthomerge.io.units import human_duration, human_size
from orthomerge.report import format as shown
from orthomerge.report.style import DARK, LIGHT
from orthomerge.report.summary import percent


def fill(template: str, /, **values: Any) -> str:
    """The page that `template`, a text that extends `frame.html`, makes of `values`."""
    return _environment().from_string(template).render(css=Markup(text_of("page.css")), **values)


def fill_with_figures(
    template: str,
    figures: Mapping[str, go.Figure | list[go.Figure]],
    more: Mapping[str, Any] | None = None,
    /,
    **values: Any,
) -> str:
    """A page with figures by the place they are drawn at; `more` is what else its scripts read."""
    data = {
        "figures": {
            place: list(map(_json, found)) if isinstance(found, list) else _json(found)
            for place, found in figures.items()
        },
        "palette": {"light": LIGHT, "dark": DARK},
        **(more or {}),
    }
    return fill(
        template,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=_version(),
        plotly=Markup(get_plotlyjs()) if figures else "",
        data=shown.script_json(data),
        **values,
    )


def text_of(name: str) -> str:
    """A file beside this one."""
    return files("orthomerge.report").joinpath(name).read_text(encoding="utf-8")


def _json(figure: go.Figure) -> dict[str, Any]:
    return json.loads(figure.to_json() or "{}")


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(text_of), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    environment.filters |= {
        "percent": percent,
        "code": shown.code,
        "duration": human_duration,
        "memory": human_size,
        "moment": shown.moment,
        "signed": shown.signed,
        "seeds": shown.seeds,
    }
    names: dict[str, Any] = environment.globals
    names["swatch"] = shown.swatch
    return environment


def _version() -> str:
    try:
        return version("orthomerge")
    except PackageNotFoundError:
        return ""
