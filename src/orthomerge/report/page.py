"""One self-contained page from a run's folder: no network, no model, only its rows and lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from orthomerge.errors import OrthomergeError
from orthomerge.evidence import Evidence
from orthomerge.files import slug, write_text
from orthomerge.report import format as shown
from orthomerge.report import sections
from orthomerge.report.aggregate import summarize
from orthomerge.report.figures import task_figure, weight_figure
from orthomerge.report.headline import headline
from orthomerge.report.sections import Group
from orthomerge.report.source import Source, labelled, read_source
from orthomerge.report.style import DARK, LIGHT, MOST_BANDS
from orthomerge.report.summary import PLAIN, Column, Summary, percent
from orthomerge.report.written import csv_table, csv_tasks
from orthomerge.rows import SINGLE

PAGE = "report.html"
WIDEST = 16
"""Of more merges the table of scores has a line each, unless there are as many arms."""

_STAGES = {
    "stats": "statistics", "init": "starts", "train": "training", "fisher": "Fisher information",
    "merge": "merging", "eval": "evaluation", "evidence": "interference and spectra",
}  # fmt: skip


def build_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder from its `results.jsonl` and what lies beside it.

    Raises:
        OrthomergeError: there are no result rows, or the page cannot be written.
    """
    target = Path(run_dir) / PAGE
    write_text(target, render_report([run_dir]))
    return target


def build_comparison(run_dirs: Sequence[str | Path], target: str | Path | None = None) -> Path:
    """Write one page that sets several runs side by side; by default beside the first one's folder.

    Arms carry the name of their run; two runs have a table of differences too.

    Raises:
        OrthomergeError: fewer than two runs, a run without rows, runs that share no task.
    """
    if len(run_dirs) < 2:
        raise OrthomergeError("a comparison needs two runs: name two folders.")
    page = render_report(run_dirs)
    names = "-".join(slug(Path(d).resolve().name) for d in run_dirs)
    path = Path(target) if target else Path(run_dirs[0]).resolve().parent / f"compare-{names}.html"
    write_text(path, page)
    return path


def render_report(run_dirs: Sequence[str | Path]) -> str:
    """The page of one run, or of several side by side, as text; nothing is written.

    Raises:
        OrthomergeError: a run without rows, or runs that share no task.
    """
    sources = [read_source(d) for d in run_dirs]
    if len(sources) > 1:
        sources = labelled(sources)
    rows = [r for s in sources for r in s.rows]
    known = list(sources[0].about) if len(sources) == 1 else []
    own = sources[0].arm_tasks if len(sources) == 1 else None
    return _render(sources, summarize(rows, known, own))


def _figures(summary: Summary, evidence: Evidence) -> dict[str, Group]:
    """Every figure there is something for, by its place on the page."""
    swept = [c for c in summary.merges if c.method == PLAIN and c.weight is not None]
    found: dict[str, Group | None] = {}
    if swept and any(summary.cell(a, c).score for a in summary.arms for c in swept):
        found["weight"] = Group("", [("", weight_figure(summary))])
    if summary.per_task:
        found["task"] = Group("", [("", task_figure(summary))])
    found["interference"] = sections.interference_group(evidence, summary.arms)
    found["spectra"] = sections.spectra_group(evidence, summary.arms)
    found["curves"] = sections.curves_group(evidence, summary.arms)
    return {place: group for place, group in found.items() if group is not None}


def _render(sources: Sequence[Source], summary: Summary) -> str:
    evidence = Evidence(
        *(
            [item for s in sources for item in getattr(s.evidence, part)]
            for part in ("disturbances", "spectra", "places", "curves")
        )
    )
    several = len(sources) > 1
    name = " against ".join(s.name for s in sources)
    figures = _figures(summary, evidence)
    shares = [c.retained for c in summary.cells.values() if c.retained is not None]
    plain, single = summary.plain, summary.single
    shown_alone = [single] if single in summary.columns else []
    data = {
        "figures": {
            place: [json.loads(figure.to_json() or "{}") for _, figure in group.figures]
            for place, group in figures.items()
        },
        "palette": {"light": LIGHT, "dark": DARK},
        "csv": {"headline": csv_table(summary), "tasks": csv_tasks(summary)},
        "name": name,
    }
    return (
        _environment()
        .get_template("page.html")
        .render(
            name=name,
            sources=sources,
            headline=headline(
                summary, {r.arm: s.name for s in sources for r in s.rows} if several else None
            ),
            summary=summary,
            groups=_groups(summary.columns),
            columns=summary.columns,
            tall=len(summary.columns) > max(WIDEST, len(summary.arms)),
            uneven=summary.uneven,
            per_task_columns=[*shown_alone, *([plain] if plain else [])],
            plain=plain,
            single=SINGLE,
            sum=PLAIN,
            notices=[*(n for s in sources for n in s.notices), *summary.notices],
            figures=figures,
            interference=sections.interference_rows(evidence, summary.arms),
            seen=sections.seen_rows(evidence, summary.arms),
            difference=sections.difference(summary, sources),
            column_head=sections.column_head,
            shade=partial(shown.shade, shares=shares),
            best={c: summary.best(c) for c in summary.columns},
            about={k: v for s in sources for k, v in s.about.items()},
            seconds=sum(sum(s.numbers("seconds").values()) for s in sources),
            stages=_STAGES,
            most_bands=MOST_BANDS,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            version=_version(),
            css=Markup(_text("page.css")),
            js=Markup("".join(map(_text, ("tables.js", "print.js", "figures.js")))),
            plotly=Markup(get_plotlyjs()) if figures else "",
            data=shown.script_json(data),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    environment.filters |= {
        "percent": percent,
        "code": shown.code,
        "duration": shown.duration,
        "memory": shown.memory,
        "moment": shown.moment,
        "signed": shown.signed,
        "seeds": shown.seeds,
    }
    names: dict[str, Any] = environment.globals
    names["swatch"] = shown.swatch
    return environment


def _text(name: str) -> str:
    return files("orthomerge.report").joinpath(name).read_text(encoding="utf-8")


def _groups(columns: list[Column]) -> list[tuple[str, str, int]]:
    """Neighbouring columns of one method and options: method, options and how many."""
    found: list[tuple[str, str, int]] = []
    for column in columns:
        if found and found[-1][:2] == (column.method, column.options):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((column.method, column.options, 1))
    return found


def _version() -> str:
    try:
        return version("orthomerge")
    except PackageNotFoundError:
        return ""
