"""Means, spreads, shares and what is left out of them, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from fake_rows import fake_rows, row

from orthomerge.io.rows import SINGLE
from orthomerge.report import Column, markdown_table, summarize
from orthomerge.report.headline import headline
from orthomerge.report.summary import percent
from orthomerge.report.written import csv_table, csv_tasks

SUM = Column("task_arithmetic", 1.0)
ALONE = Column(SINGLE)


def merged(task, arm, value, seed=0, weight=1.0, method="task_arithmetic", **more):
    return row(task, arm, value, method=method, weight=weight, seed=seed, **more)


def two_seeds():
    """Singles 0.8 and 0.9 (seed 0), 0.6 and 0.9 (seed 1); sums 0.6, 0.7 and 0.5, 0.6."""
    return [
        row("a", "x", 0.8), row("b", "x", 0.9),
        row("a", "x", 0.6, seed=1), row("b", "x", 0.9, seed=1),
        merged("a", "x", 0.6), merged("b", "x", 0.7),
        merged("a", "x", 0.5, 1), merged("b", "x", 0.6, 1),
    ]  # fmt: skip


def test_mean_over_tasks_then_seeds_with_sample_spread():
    cell = summarize(two_seeds()).cells["x", SUM]
    assert cell.score is not None
    assert cell.score.mean == pytest.approx((0.65 + 0.55) / 2)
    assert cell.score.spread == pytest.approx(0.1 / 2**0.5)
    assert cell.score.seeds == (0, 1)
    assert str(cell.score) == "60.0 ± 7.1"


def test_retained_share_is_of_the_same_seeds():
    cell = summarize(two_seeds()).cells["x", SUM]
    assert cell.retained == pytest.approx(1.2 / (0.85 + 0.75))
    only_first = [r for r in two_seeds() if r.method == SINGLE or r.seed == 0]
    assert summarize(only_first).cells["x", SUM].retained == pytest.approx(0.65 / 0.85)


def test_no_share_without_singles_or_of_nothing():
    merges = [r for r in two_seeds() if r.method != SINGLE]
    assert summarize(merges).cells["x", SUM].retained is None
    zero = [replace(r, value=0.0) if r.method == SINGLE else r for r in two_seeds()]
    assert summarize(zero).cells["x", SUM].retained is None


def test_a_seed_short_of_a_task_is_left_out_and_said():
    rows = two_seeds()[:-1]
    summary = summarize(rows)
    cell = summary.cells["x", SUM]
    assert cell.score is not None
    assert cell.score.seeds == (0,)
    assert cell.score.spread is None
    assert cell.unfinished == {1: 1}
    assert summary.notices == ["x, sum × 1, seed 1: 1 of 2 tasks so far; not in the means."]
    # A task's own mean uses the whole seeds too.
    assert summary.per_task["x", SUM, "a"].mean == pytest.approx(0.6)


def test_a_task_known_from_the_record_counts_before_it_has_rows():
    summary = summarize(two_seeds(), tasks=["a", "b", "c"])
    assert all(cell.score is None for cell in summary.cells.values())
    assert summary.tasks == ["a", "b", "c"]
    # With no whole seed, the task table shows what there is.
    assert summary.per_task["x", SUM, "b"].mean == pytest.approx(0.65)


def test_one_seed_has_no_spread():
    summary = summarize([r for r in two_seeds() if r.seed == 0])
    assert summary.cells["x", ALONE].score is not None
    assert str(summary.cells["x", ALONE].score) == "85.0"
    assert summary.seeds == 1


def test_columns_are_alone_then_sums_by_weight_then_the_rest_as_they_came():
    rows = [
        merged("a", "x", 0.5, method="ties", weight=1.0),
        merged("a", "x", 0.5, method="ties", weight=0.5),
        merged("a", "x", 0.5, method="dare_ties", options={"density": 0.2}),
        merged("a", "x", 0.5, method="ties", options={"density": 0.2}),
        merged("a", "x", 0.5, weight=1.0),
        merged("a", "x", 0.5, weight=0.3),
        row("a", "x", 0.5),
    ]
    assert [c.label for c in summarize(rows).columns] == [
        "single", "sum × 0.3", "sum × 1", "ties × 0.5", "ties × 1",
        "dare_ties (density=0.2) × 1", "ties (density=0.2) × 1",
    ]  # fmt: skip


def test_ties_within_rounding_are_all_best():
    rows = [row("a", "x", 0.80004), row("a", "y", 0.8), row("a", "z", 0.79)]
    assert summarize(rows).best(ALONE) == {"x", "y"}
    assert summarize(rows[:1]).best(ALONE) == set()


def test_later_row_of_one_cell_wins_and_is_said():
    first = merged("a", "x", 0.2)
    summary = summarize([row("a", "x", 0.9), first, replace(first, value=0.6, key="other")])
    assert summary.cells["x", SUM].score.mean == pytest.approx(0.6)  # type: ignore[union-attr]
    assert "1 row replaced" in summary.notices[0]


def test_an_arm_is_shown_at_its_latest_learning_rate():
    summary = summarize([row("a", "x", 0.9, rate=0.1), row("a", "x", 0.5, rate=0.2)])
    assert summary.arms[0].learning_rate == 0.2
    assert summary.cells["x", ALONE].score.mean == 0.5  # type: ignore[union-attr]
    assert "earlier learning rate" in summary.notices[0]


def test_rows_without_a_finite_score_are_left_out():
    summary = summarize([row("a", "x", float("nan")), row("a", "y", 0.5)])
    assert [a.name for a in summary.arms] == ["y"]
    assert "without a finite score" in summary.notices[0]


def test_selection_rows_stay_out_of_every_result():
    rows = [row("a", "x", 0.5, rate=0.1)]
    rows += [row("a", "x", v, split="selection", rate=r) for r, v in ((0.1, 0.9), (0.2, 0.7))]
    summary = summarize(rows)
    assert summary.cells["x", ALONE].score.mean == 0.5  # type: ignore[union-attr]
    assert summary.selection.rates == [0.1, 0.2]
    assert summary.selection.scores["x", 0.1].mean == 0.9
    assert summary.selection.chosen == {"x": 0.1}
    only = summarize(rows[1:])
    assert only.cells == {}
    assert headline(only) == ["No arm has been scored on every task yet."]


def test_constant_answers_need_every_task():
    rows = [row("a", "x", 0.9, majority=0.5), row("b", "x", 0.9, majority=0.7)]
    assert summarize(rows).floor == pytest.approx(0.6)
    assert summarize([rows[0], replace(rows[1], majority=None)]).floor is None


def test_plain_is_the_sum_closest_to_one_or_another_method():
    assert summarize([merged("a", "x", 0.5, weight=w) for w in (0.3, 0.8)]).plain == Column(
        "task_arithmetic", 0.8
    )
    assert summarize([merged("a", "x", 0.5, method="ties")]).plain == Column("ties", 1.0)
    assert summarize([row("a", "x", 0.5)]).plain is None


def test_headline_sets_the_best_merge_against_the_default_start():
    rows = [
        row("a", "default", 0.8), merged("a", "default", 0.4),
        row("a", "osrm", 0.8, start="eigh"), merged("a", "osrm", 0.6, start="eigh"),
        row("a", "other", 0.8, start="eigh"), merged("a", "other", 0.5, start="eigh"),
    ]  # fmt: skip
    assert headline(summarize(rows)) == [
        "The plain sum of 1 adapter keeps 75.0 % of the single-task score with `osrm`, "
        "50.0 % with `default`.",
        "In points: 60.0 merged against 80.0 alone, and 40.0 against 80.0.",
        "One seed: how far this varies between seeds is not known.",
    ]


def test_headline_says_where_a_single_adapter_is_no_better_than_a_constant():
    rows = [
        row("a", "default", 0.8, majority=0.5), merged("a", "default", 0.8),
        row("b", "default", 0.5, majority=0.5), merged("b", "default", 0.5),
    ]  # fmt: skip
    said = headline(summarize(rows))
    assert "keeps 100.0 %" in said[0]
    assert (
        "With `default` the single adapter is no better than a constant answer on `b`: it learnt "
        "nothing that a merge could keep."
    ) in said


def test_headline_says_when_the_default_start_is_best():
    rows = [
        row("a", "default", 0.8), merged("a", "default", 0.6),
        row("a", "osrm", 0.8, start="eigh"), merged("a", "osrm", 0.4, start="eigh"),
    ]  # fmt: skip
    assert "75.0 % of the single-task score with `default`, 50.0 % with `osrm`" in headline(
        summarize(rows)
    )[0]  # fmt: skip


def test_headline_admits_a_difference_within_the_spread():
    rows = []
    for arm, values in (("x", (0.50, 0.60)), ("y", (0.48, 0.58))):
        for seed, value in enumerate(values):
            rows += [row("a", arm, 0.8, seed=seed), merged("a", arm, value, seed)]
    assert headline(summarize(rows))[-1] == "The difference is within the spread over seeds."


def test_headline_without_merges_or_shares():
    assert headline(summarize([row("a", "x", 0.8)])) == [
        "No merge scored yet. Alone, the adapters of `x` score 80.0."
    ]
    assert headline(summarize([merged("a", "x", 0.5)])) == [
        "The plain sum of 1 adapter scores 50.0 with `x`."
    ]


def test_markdown_table():
    rows = [
        row("a", "x|1", 0.8), merged("a", "x|1", 0.6),
        row("a", "y", 0.8), merged("a", "y", 0.7),
        row("a", "z", 0.7),
    ]  # fmt: skip
    assert markdown_table(rows) == (
        "| arm | single | sum × 1 |\n"
        "| --- | ---: | ---: |\n"
        "| x\\|1 | **80.0** | 60.0 |\n"
        "| y | **80.0** | **70.0** |\n"
        "| z | 70.0 | – |\n"
    )


def test_csv_holds_full_precision():
    lines = list(csv.DictReader(io.StringIO(csv_table(summarize(two_seeds())))))
    assert [line["method"] for line in lines] == ["single", "task_arithmetic"]
    assert float(lines[1]["mean"]) == pytest.approx(0.6)
    assert float(lines[1]["retained"]) == pytest.approx(0.75)
    assert lines[1]["seeds"] == "2"
    by_task = list(csv.DictReader(io.StringIO(csv_tasks(summarize(two_seeds())))))
    assert len(by_task) == 4
    assert float(by_task[0]["mean"]) == pytest.approx(0.7)
    assert by_task[0]["constant_answer"] == "0.5"


def test_a_whole_run():
    rows = fake_rows()
    summary = summarize(rows)
    assert (len(summary.arms), len(summary.tasks), len(summary.columns)) == (12, 8, 11)
    assert summary.notices == []
    assert all(len(c.score.seeds) == 3 for c in summary.cells.values() if c.score)
    test = [r for r in rows if r.arm == "osrm" and r.method == "tsv_m" and r.split == "test"]
    expected = sum(r.value for r in test) / len(test)
    score = summary.cells["osrm", Column("tsv_m", 1.0)].score
    assert score is not None
    assert score.mean == pytest.approx(expected)


def test_order_of_rows_does_not_change_the_numbers():
    rows = fake_rows(["default", "osrm"], ["a", "b"])
    shuffled = sorted(rows, key=lambda r: r.key)
    assert {k: c.score for k, c in summarize(rows).cells.items()} == {
        k: c.score for k, c in summarize(shuffled).cells.items()
    }


def test_percent_has_no_negative_zero():
    assert percent(-0.0001) == "0.0"
    assert percent(0.83649) == "83.6"
