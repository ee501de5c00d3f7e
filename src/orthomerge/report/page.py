"""One self-contained page from a run's folder: no network, no model, only its rows and lines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from orthomerge.errors import OrthomergeError
from orthomerge.io.analyses import Analyses
from orthomerge.io.files import slug, write_text
from orthomerge.io.outputs import is_page, require_free_file
from orthomerge.io.rows import SINGLE
from orthomerge.report import format as shown
from orthomerge.report.aggregate import summarize
from orthomerge.report.analyses import (
    analysis_groups,
    distilled_rows,
    interference_rows,
    seen_rows,
)
from orthomerge.report.figures import task_figure, weight_figure
from orthomerge.report.headline import headline
from orthomerge.report.source import Source, difference, labelled, read_source
from orthomerge.report.style import MOST_BANDS, Group
from orthomerge.report.summary import PLAIN, Column, Summary
from orthomerge.report.templates import fill_with_figures, text_of
from orthomerge.report.written import csv_table, csv_tasks

PAGE = "report.html"
WIDEST = 16
"""Of more merges the table of scores has a line each, unless there are as many arms."""

_STAGES = {
    "stats": "statistics", "init": "starts", "train": "training", "fisher": "Fisher information",
    "merge": "merging", "distill": "distillation", "eval": "evaluation",
    "evidence": "interference and spectra",
}  # fmt: skip


def build_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder from its `results.jsonl` and the files next to it.

    Raises:
        OutputError: there is another page of that name.
        OrthomergeError: there are no result rows, or the page cannot be written.
    """
    target = Path(run_dir) / PAGE
    require_free_file(target, is_page)
    write_text(target, render_report([run_dir]))
    return target


def build_comparison(run_dirs: Sequence[str | Path], target: str | Path | None = None) -> Path:
    """Write one page that compares several runs; by default next to the first one's folder.

    Arms carry the name of their run; two runs have a table of differences too.

    Raises:
        OutputError: there is another file of that name.
        OrthomergeError: fewer than two runs, a run without rows, runs that share no task.
    """
    if len(run_dirs) < 2:
        raise OrthomergeError("a comparison needs two runs: name two folders.")
    names = "-".join(slug(Path(d).resolve().name) for d in run_dirs)
    path = Path(target) if target else Path(run_dirs[0]).resolve().parent / f"compare-{names}.html"
    rows = [Path(run) / "results.jsonl" for run in run_dirs]
    require_free_file(path, is_page, inputs=rows)
    write_text(path, render_report(run_dirs))
    return path


def render_report(run_dirs: Sequence[str | Path]) -> str:
    """The page of one run, or of several next to each other, as text; nothing is written.

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


def _figures(summary: Summary, analyses: Analyses) -> dict[str, Group]:
    """Every figure there is something for, by its place on the page."""
    swept = [c for c in summary.merges if c.method == PLAIN and c.weight is not None]
    found: dict[str, Group | None] = {}
    if swept and any(summary.cell(a, c).score for a in summary.arms for c in swept):
        found["weight"] = Group("", [("", weight_figure(summary))])
    if summary.per_task:
        found["task"] = Group("", [("", task_figure(summary))])
    found |= analysis_groups(analyses, summary.arms)
    return {place: group for place, group in found.items() if group is not None}


def _render(sources: Sequence[Source], summary: Summary) -> str:
    name = " against ".join(s.name for s in sources)
    analyses = _analyses(sources)
    figures = _figures(summary, analyses)
    return fill_with_figures(
        text_of("page.html"),
        {place: [figure for _, figure in group.figures] for place, group in figures.items()},
        {"csv": {"headline": csv_table(summary), "tasks": csv_tasks(summary)}, "name": name},
        name=name,
        figures=figures,
        interference=interference_rows(analyses, summary.arms),
        seen=seen_rows(analyses, summary.arms),
        distilled=distilled_rows(analyses, summary.arms),
        difference=difference(summary, sources),
        most_bands=MOST_BANDS,
        js=Markup("".join(map(text_of, ("tables.js", "print.js", "figures.js")))),
        **_about_scores(summary),
        **_about_runs(sources, summary),
    )


def _analyses(sources: Sequence[Source]) -> Analyses:
    """The files next to the rows of all runs."""
    parts = ("disturbances", "spectra", "shares", "curves", "distillations")
    return Analyses(*([i for s in sources for i in getattr(s.analyses, part)] for part in parts))


def _about_scores(summary: Summary) -> dict[str, Any]:
    """What the template shows about the scores and of the tables that show them."""
    shares = [c.retained for c in summary.cells.values() if c.retained is not None]
    plain, single = summary.plain, summary.single
    return {
        "summary": summary,
        "groups": _groups(summary.columns),
        "columns": summary.columns,
        "tall": len(summary.columns) > max(WIDEST, len(summary.arms)),
        "uneven": summary.uneven,
        "per_task_columns": [
            *([single] if single in summary.columns else []),
            *([plain] if plain else []),
        ],
        "plain": plain,
        "single": SINGLE,
        "sum": PLAIN,
        "shade": partial(shown.shade, shares=shares),
        "best": {c: summary.best(c) for c in summary.columns},
    }


def _about_runs(sources: Sequence[Source], summary: Summary) -> dict[str, Any]:
    """What the template shows about the runs: where rows come from, and what is to be said."""
    runs = {r.arm: s.name for s in sources for r in s.rows} if len(sources) > 1 else None
    return {
        "sources": sources,
        "headline": headline(summary, runs),
        "notices": [*(n for s in sources for n in s.notices), *summary.notices],
        "about": {k: v for s in sources for k, v in s.about.items()},
        "seconds": sum(sum(s.numbers("seconds").values()) for s in sources),
        "stages": _STAGES,
    }


def _groups(columns: list[Column]) -> list[tuple[str, str, int]]:
    """Neighbouring columns of one method and options: method, options and how many."""
    found: list[tuple[str, str, int]] = []
    for column in columns:
        if found and found[-1][:2] == (column.method, column.options):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((column.method, column.options, 1))
    return found
