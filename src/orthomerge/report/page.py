"""One self-contained page from a run's folder: no network, no model, only its rows."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from orthomerge.errors import OrthomergeError
from orthomerge.files import write_text
from orthomerge.report.figures import DARK, LIGHT, SYMBOLS, symbol, task_figure, weight_figure
from orthomerge.report.tables import (
    PLAIN,
    Arm,
    Column,
    Summary,
    csv_table,
    csv_tasks,
    headline,
    percent,
    summarize,
)
from orthomerge.rows import SINGLE, read_rows

ROWS, RUN, PAGE = "results.jsonl", "run.json", "report.html"


def build_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder from its `results.jsonl` and, if there, `run.json`.

    Raises:
        OrthomergeError: there are no result rows, or the page cannot be written.
    """
    folder = Path(run_dir)
    rows = read_rows(folder / ROWS)
    if not rows:
        raise OrthomergeError(
            f"'{folder / ROWS}' holds no row: run a recipe with this output first."
        )
    run, notices = _record(folder / RUN)
    about = [t for t in _list(run.get("tasks")) if isinstance(t, dict) and t.get("name")]
    summary = summarize(rows, [str(t["name"]) for t in about])
    expected = run.get("expected_rows")
    if isinstance(expected, int) and len(rows) < expected:
        notices.append(f"This run is not finished: {len(rows):,} of {expected:,} rows so far.")
    page = _render(folder, run, about, summary, [*notices, *summary.notices])
    target = folder / PAGE
    write_text(target, page)
    return target


def _record(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The run's record; the page does without one that is missing or broken."""
    if not path.is_file():
        return {}, [f"No {RUN} beside the rows: the page is made from the rows alone."]
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return {}, [f"{RUN} cannot be read: the page is made from the rows alone."]
    return record, []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _render(
    folder: Path,
    run: dict[str, Any],
    about: list[dict[str, Any]],
    summary: Summary,
    notices: list[str],
) -> str:
    source = files("orthomerge.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters |= {"percent": percent, "code": _code, "duration": _duration}
    environment.filters["seeds"] = _seeds
    template = environment.from_string(source.joinpath("page.html").read_text(encoding="utf-8"))
    plain = summary.plain
    swept = [c for c in summary.merges if c.method == PLAIN and c.weight is not None]
    figures: dict[str, go.Figure] = {}
    if swept and any(summary.cell(a, c).score for a in summary.arms for c in swept):
        figures["weight"] = weight_figure(summary)
    if summary.per_task:
        figures["task"] = task_figure(summary)
    shares = [c.retained for c in summary.cells.values() if c.retained is not None]
    shown_alone = [summary.single] if summary.single in summary.columns else []
    return template.render(
        name=str(run.get("name") or folder.resolve().name),
        headline=headline(summary),
        summary=summary,
        groups=_groups(summary.columns),
        columns=summary.columns,
        per_task_columns=[*shown_alone, *([plain] if plain else [])],
        plain=plain,
        single=SINGLE,
        sum=PLAIN,
        notices=notices,
        figures={key: figure["layout"]["meta"] for key, figure in figures.items()},
        shade=lambda value: _shade(value, shares),
        swatch=_swatch,
        bests={c: summary.best(c) for c in summary.columns},
        about={str(t["name"]): t for t in about},
        run=run,
        base=_dict(run.get("base")),
        versions=_dict(run.get("versions")),
        seconds={k: v for k, v in _dict(run.get("seconds")).items() if isinstance(v, int | float)},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=_version(),
        css=Markup(source.joinpath("page.css").read_text(encoding="utf-8")),
        js=Markup(source.joinpath("page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()) if figures else "",
        data=_script_json(
            {
                "figures": {key: json.loads(f.to_json() or "{}") for key, f in figures.items()},
                "palette": {"light": LIGHT, "dark": DARK},
                "csv": {"headline": csv_table(summary), "tasks": csv_tasks(summary)},
                "name": str(run.get("name") or folder.resolve().name),
            }
        ),
    )


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _groups(columns: list[Column]) -> list[tuple[str, str, int]]:
    """Neighbouring columns of one method and options: method, options and how many."""
    found: list[tuple[str, str, int]] = []
    for column in columns:
        if found and found[-1][:2] == (column.method, column.options):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((column.method, column.options, 1))
    return found


def _shade(value: float | None, shares: list[float]) -> str:
    """How strongly a cell is tinted, 0 to 1 between the lowest and the highest share kept."""
    if value is None or len(shares) < 2 or max(shares) <= min(shares):
        return "0"
    return f"{(value - min(shares)) / (max(shares) - min(shares)):.3f}"


_PATHS = {
    "circle": "M6 1a5 5 0 1 0 .01 0z",
    "square": "M1.5 1.5h9v9h-9z",
    "diamond": "M6 .3 11.7 6 6 11.7.3 6z",
    "triangle-up": "M6 .8 11.6 10.8H.4z",
    "triangle-down": "M6 11.2 11.6 1.2H.4z",
    "x": "M1 3.2 3.2 1 6 3.8 8.8 1 11 3.2 8.2 6 11 8.8 8.8 11 6 8.2 3.2 11 1 8.8 3.8 6z",
    "star": "m6 .4 1.6 3.6 4 .4-3 2.6.9 3.9L6 8.9l-3.5 2 .9-3.9-3-2.6 4-.4z",
    "hexagon": "M6 .3 11 3.2v5.6L6 11.7 1 8.8V3.2z",
}
assert set(_PATHS) == set(SYMBOLS)


def _swatch(arm: Arm) -> Markup:
    """The arm's marker in its colour, as in the figures."""
    path = _PATHS[symbol(arm.slot)]
    slot = arm.slot % len(LIGHT)
    return Markup('<svg class="swatch s{}" viewBox="0 0 12 12" aria-hidden="true">').format(
        slot
    ) + Markup('<path d="{}"/></svg>').format(path)


def _code(text: str) -> Markup:
    """Text whose backquoted parts become code elements, everything escaped."""
    parts = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _seeds(seeds: tuple[int, ...]) -> str:
    """Seeds by name, or how many where they are many."""
    if len(seeds) <= 5:
        return ", ".join(map(str, seeds)) or "–"
    return f"{len(seeds)} ({seeds[0]} to {seeds[-1]})"


def _version() -> str:
    try:
        return version("orthomerge")
    except PackageNotFoundError:
        return ""
