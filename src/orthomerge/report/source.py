"""What a page is made of: the rows of one run or several, and the files next to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError
from orthomerge.io.analyses import Analyses, read_analyses
from orthomerge.io.documents import is_array, is_object, read_json
from orthomerge.io.files import file_sha256
from orthomerge.io.rows import ResultRow, read_rows
from orthomerge.report.summary import Column, Summary

ROWS, RUN = "results.jsonl", "run.json"


@dataclass(frozen=True)
class Source:
    """One run: its rows, its record (empty where there is none) and its analyses."""

    folder: Path
    name: str
    rows: list[ResultRow]
    run: dict[str, Any]
    analyses: Analyses
    notices: list[str]
    rows_sha256: str

    @property
    def about(self) -> dict[str, dict[str, Any]]:
        """What the record says about each task."""
        tasks = self.run.get("tasks")
        found = tasks if is_array(tasks) else []
        return {str(t["name"]): t for t in found if is_object(t) and t.get("name")}

    def part(self, key: str) -> dict[str, Any]:
        """A mapping of the record, empty where it is none."""
        value = self.run.get(key)
        return value if is_object(value) else {}

    @property
    def arm_tasks(self) -> dict[str, list[str]]:
        """The tasks of arms that have not all of the run's."""
        found = self.part("arm_tasks").items()
        return {str(arm): [str(t) for t in tasks] for arm, tasks in found if is_array(tasks)}

    @property
    def answered(self) -> list[str]:
        """How the rows' tasks are answered, and which where not all are alike."""
        ways: dict[str, list[str]] = {}
        for task, row in {r.task: r for r in self.rows}.items():
            way = (
                f"as text, scored by {row.scoring}" if row.form == "text" else "by heads of labels"
            )
            ways.setdefault(way, []).append(task)
        if len(ways) == 1:
            return list(ways)
        return [f"{way} ({', '.join(tasks)})" for way, tasks in ways.items()]

    def numbers(self, key: str) -> dict[str, float]:
        """The numbers of a mapping of the record."""
        return {k: v for k, v in self.part(key).items() if isinstance(v, int | float)}


def read_source(folder: str | Path) -> Source:
    """A run's folder.

    Raises:
        OrthomergeError: there are no result rows, or analyses that cannot be read.
    """
    folder = Path(folder)
    rows = read_rows(folder / ROWS)
    if not rows:
        raise OrthomergeError(
            f"'{folder / ROWS}' holds no row: run a recipe with this output first."
        )
    run, notices = _record(folder / RUN)
    expected = run.get("expected_rows")
    if isinstance(expected, int) and len(rows) < expected:
        notices.append(f"This run is not finished: {len(rows):,} of {expected:,} rows so far.")
    return Source(
        folder=folder,
        name=str(run.get("name") or folder.resolve().name),
        rows=rows,
        run=run,
        analyses=read_analyses(folder),
        notices=notices,
        rows_sha256=file_sha256(folder / ROWS),
    )


def _record(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The run's record; the page does without one that is missing or broken."""
    if not path.is_file():
        return {}, [f"No {RUN} beside the rows: the page is made from the rows alone."]
    try:
        record = read_json(path)
    except ValueError:
        record = None
    if not is_object(record):
        return {}, [f"{RUN} cannot be read: the page is made from the rows alone."]
    return record, []


def labelled(sources: Sequence[Source]) -> list[Source]:
    """Several runs for one page: names made distinct, arms prefixed, only the common tasks.

    Raises:
        OrthomergeError: the runs share no task.
    """
    names = [s.name for s in sources]
    if len(set(names)) < len(names):
        names = [s.folder.resolve().name for s in sources]
    if len(set(names)) < len(names):
        names = [str(s.folder) for s in sources]
    tasks = [dict.fromkeys(r.task for r in s.rows) for s in sources]
    shared = [t for t in tasks[0] if all(t in other for other in tasks[1:])]
    if not shared:
        said = "; ".join(f"{n}: {', '.join(t)}" for n, t in zip(names, tasks, strict=True))
        raise OrthomergeError(f"these runs share no task ({said}): compare runs of the same tasks.")
    left = sorted({t for each in tasks for t in each} - set(shared))
    notices = [f"Left out, since not every run has them: {', '.join(left)}."] if left else []
    if len({tuple(s.answered) for s in sources}) > 1:
        said = "; ".join(
            f"{n}: {', '.join(s.answered)}" for n, s in zip(names, sources, strict=True)
        )
        notices.append(f"These runs do not answer their tasks alike ({said}).")
    return [
        _prefixed(source, name, shared, notices if place == 0 else [])
        for place, (source, name) in enumerate(zip(sources, names, strict=True))
    ]


def arm_of(name: str, arm: str) -> str:
    """An arm's name beside those of other runs."""
    return f"{name}: {arm}"


@dataclass(frozen=True)
class DifferenceTable:
    """What an arm scores in the second run less what it scores in the first, merge by merge."""

    columns: list[Column]
    rows: list[tuple[str, list[float | None]]]


def difference(summary: Summary, sources: Sequence[Source]) -> DifferenceTable | None:
    """The arms and merges that both of two runs have; None for other than two, or none shared."""
    if len(sources) != 2:
        return None
    arms = {a.name: a for a in summary.arms}
    first, second = (s.name for s in sources)
    plain = dict.fromkeys(r.arm.removeprefix(f"{first}: ") for r in sources[0].rows)
    both = [n for n in plain if arm_of(second, n) in arms]
    rows: list[tuple[str, list[float | None]]] = []
    used: set[Column] = set()
    for name in both:
        values: list[float | None] = []
        for column in summary.columns:
            a, b = (summary.cell(arms[arm_of(r, name)], column).score for r in (first, second))
            values.append(b.mean - a.mean if a and b else None)
            if a and b:
                used.add(column)
        rows.append((name, values))
    kept = [i for i, c in enumerate(summary.columns) if c in used]
    if not rows or not kept:
        return None
    return DifferenceTable(
        [summary.columns[i] for i in kept], [(n, [v[i] for i in kept]) for n, v in rows]
    )


def _prefixed(source: Source, name: str, tasks: list[str], notices: list[str]) -> Source:
    analyses = source.analyses
    whole = [d for d in analyses.disturbances if d.tasks == tasks]
    return replace(
        source,
        name=name,
        rows=[replace(r, arm=arm_of(name, r.arm)) for r in source.rows if r.task in tasks],
        analyses=Analyses(
            disturbances=[replace(d, arm=arm_of(name, d.arm)) for d in whole],
            curves=[
                replace(c, arm=arm_of(name, c.arm)) for c in analyses.curves if c.task in tasks
            ],
            distillations=[
                replace(d, arm=arm_of(name, d.arm))
                for d in analyses.distillations
                if list(d.after) == tasks
            ],
        ),
        notices=[*notices, *(f"{name}: {n}" for n in source.notices)],
    )
