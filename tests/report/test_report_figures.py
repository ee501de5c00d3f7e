"""Figures carry the summary's numbers, and an arm looks the same in all of them."""

from __future__ import annotations

import pytest
from fake_rows import ARMS, TASKS, fake_rows, row

from orthomerge.io.analyses import Curve
from orthomerge.report import summarize, task_figure, weight_figure
from orthomerge.report.analyses import curve_figure
from orthomerge.report.style import DARK, LIGHT, colour, dash, symbol

CARDS = {"light": "#ffffff", "dark": "#181d23"}


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("palette", "theme"), [(LIGHT, "light"), (DARK, "dark")])
def test_colours_stand_out_from_the_page(palette, theme):
    for shade in palette:
        light, dark = sorted([luminance(shade), luminance(CARDS[theme])], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, shade


def test_arms_look_different():
    looks = {(colour(s), symbol(s), dash(s)) for s in range(24)}
    assert len(looks) == 24


def test_lines_hold_the_means_and_spreads():
    summary = summarize(fake_rows())
    figure = weight_figure(summary)
    lines = [t for t in figure.data if t.mode == "lines+markers"]
    assert [t.name for t in lines] == ARMS
    for arm, line in zip(summary.arms, lines, strict=True):
        assert list(line.x) == [0.1, 0.3, 0.5, 0.7, 1.0]
        for column, y, e in zip(summary.columns[1:6], line.y, line.error_y.array, strict=True):
            score = summary.cell(arm, column).score
            assert score is not None and score.spread is not None
            assert y == pytest.approx(100 * score.mean)
            assert e == pytest.approx(100 * score.spread)


def test_an_arm_keeps_its_colour():
    summary = summarize(fake_rows())
    for figure in (weight_figure(summary), task_figure(summary)):
        for trace in figure.data:
            if trace.meta["slot"] >= 0:
                assert trace.marker.color == colour(ARMS.index(trace.name))


def test_one_seed_draws_no_error_bars():
    figure = weight_figure(summarize(fake_rows(ARMS[:3], seeds=[0])))
    assert all(t.error_y.array is None for t in figure.data)


def test_bars_hold_every_task():
    summary = summarize(fake_rows())
    bars = [t for t in task_figure(summary).data if t.type == "bar"]
    assert len(bars) == len(ARMS)
    assert list(bars[0].x) == TASKS
    assert bars[2].y[3] == pytest.approx(100 * summary.per_task["osrm", summary.plain, "stsb"].mean)


def test_figures_without_merges_still_draw():
    summary = summarize([row("a", "x", 0.5)])
    assert len(weight_figure(summary).data) == 3
    assert [t.type for t in task_figure(summary).data] == ["scatter"]


def test_names_are_not_markup():
    figure = task_figure(summarize([row("<b>t</b>", "<a href='x'>", 0.5)]))
    assert figure.data[0].name == "&lt;a href='x'&gt;"
    assert "<b>t" not in figure.data[0].text[0]


def test_an_arm_without_merges_is_named_too():
    rows = [*fake_rows(ARMS[:2], TASKS[:2]), *fake_rows(["late"], TASKS[:2], merges=[])]
    for figure in (weight_figure(summarize(rows)), task_figure(summarize(rows))):
        named = {t.name for t in figure.data if t.showlegend is not False}
        assert {*ARMS[:2], "late"} <= named


def test_a_mean_over_fewer_seeds_is_hollow():
    rows = fake_rows(["default"], TASKS[:2], merges=[("task_arithmetic", 0.5, {})])
    rows += fake_rows(["default"], TASKS[:2], seeds=[0], merges=[("task_arithmetic", 1.0, {})])
    summary = summarize(rows)
    assert summary.uneven
    (line,) = [t for t in weight_figure(summary).data if t.mode == "lines+markers"]
    assert list(line.marker.symbol) == ["circle", "circle-open"]
    assert not summarize(fake_rows(ARMS[:2], TASKS[:2])).uneven


def test_curves_of_many_arms_have_no_bands():
    for count, bands in ((6, 6), (7, 0)):
        curves = [
            Curve(f"{a} {s}", a, s, "t", 0.1, [[1, 2.0], [2, 1.0 + s]])
            for a in ARMS[:count]
            for s in (0, 1)
        ]
        figure = curve_figure(curves, {a: i for i, a in enumerate(ARMS[:count])})
        assert sum(bool(t.meta.get("band")) for t in figure.data) == bands
