"""The parts of the page that more than rows stand behind, and the difference of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import plotly.graph_objects as go

from orthomerge.io.evidence import Curve, Disturbance, Evidence, Place
from orthomerge.io.rows import SINGLE
from orthomerge.report.curves import curve_figure
from orthomerge.report.matrices import heatmap_figure, mean_disturbance, overall
from orthomerge.report.source import Source, arm_of
from orthomerge.report.spectra import spectrum_figure
from orthomerge.report.summary import Arm, Column, Summary

_Of = TypeVar("_Of", Disturbance, Curve)
Figures = list[tuple[str, go.Figure]]
"""Figures of which the page shows one at a time, each with what it is chosen by."""


@dataclass(frozen=True)
class Group:
    """Figures that share a place on the page; `choice` says what they are told apart by."""

    choice: str
    figures: Figures

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


def interference_group(evidence: Evidence, arms: Sequence[Arm]) -> Group | None:
    """A heat map an arm, means over its seeds; the slider goes through the layers."""
    found: list[tuple[str, go.Figure]] = []
    for arm in arms:
        mine = _current(evidence.disturbances, arm)
        if mine:
            mean = mean_disturbance(mine)
            found.append((arm.name, heatmap_figure(mean["tasks"], mean["matrix"], mean["layers"])))
    return Group("arm", found) if found else None


def interference_rows(evidence: Evidence, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Each arm's mean interference, and that of its loudest pair; means over seeds."""
    rows: list[dict[str, Any]] = []
    for arm in arms:
        mine = _current(evidence.disturbances, arm)
        if not mine:
            continue
        mean = mean_disturbance(mine)
        tasks, matrix = mean["tasks"], mean["matrix"]
        pairs = [
            (value, tasks[i], tasks[j])
            for i, row in enumerate(matrix)
            for j, value in enumerate(row)
            if i != j and value is not None
        ]
        worst = max(pairs, default=None)
        rows.append({"arm": arm, "mean": overall(matrix), "worst": worst, "seeds": len(mine)})
    return rows


def spectra_group(evidence: Evidence, arms: Sequence[Arm]) -> Group | None:
    """A figure a task: spectra, and where each arm's `A` lies; the slider goes through layers."""
    slots = {a.name: a.slot for a in arms}
    tasks = dict.fromkeys(s.task for s in evidence.spectra)
    found: list[tuple[str, go.Figure]] = []
    for task in tasks:
        mine = [s for s in evidence.spectra if s.task == task]
        places = [p for p in evidence.places if p.task == task]
        found.append((task, spectrum_figure(mine, places, slots)))
    return Group("task", found) if found else None


def seen_rows(evidence: Evidence, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """What each arm's `A` sees of its own and the others' features, means over tasks and layers."""
    rows: list[dict[str, Any]] = []
    for arm in arms:
        mine: list[Place] = [p for p in evidence.places if p.arm == arm.name]
        if mine:
            own, others = (sum(p.seen[k] for p in mine) / len(mine) for k in (0, 1))
            rows.append({"arm": arm, "own": own, "others": others})
    return rows


def curves_group(evidence: Evidence, arms: Sequence[Arm]) -> Group | None:
    """A figure a task: the loss of every arm's training."""
    slots = {a.name: a.slot for a in arms}
    mine: list[Curve] = [c for arm in arms for c in _current(evidence.curves, arm)]
    tasks = dict.fromkeys(c.task for c in mine)
    found = [(t, curve_figure([c for c in mine if c.task == t], slots)) for t in tasks]
    return Group("task", found) if found else None


def _current(records: Sequence[_Of], arm: Arm) -> list[_Of]:
    """An arm's records at the learning rate that it reports."""
    return [r for r in records if r.arm == arm.name and r.learning_rate == arm.learning_rate]


@dataclass(frozen=True)
class Difference:
    """What an arm scores in the second run less what it scores in the first, merge by merge."""

    columns: list[Column]
    rows: list[tuple[str, list[float | None]]]


def difference(summary: Summary, sources: Sequence[Source]) -> Difference | None:
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
    return Difference(
        [summary.columns[i] for i in kept], [(n, [v[i] for i in kept]) for n, v in rows]
    )


def column_head(column: Column) -> str:
    """A column's name in a heading of one line."""
    return "alone" if column.method == SINGLE else column.label
