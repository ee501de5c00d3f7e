"""Methods against arms, from hand-made rows with figures worked out by hand."""

from __future__ import annotations

import json

import pytest
from conftest import call
from fake_rows import row

from orthomerge.io.rows import append_rows
from orthomerge.report import markdown_methods, method_table, methods_json

TASKS = ("a", "b")


def both(arm, first, second, **about):
    """A row of each of two tasks."""
    return [row(t, arm, v, **about) for t, v in zip(TASKS, (first, second), strict=True)]


def merge(arm, method, seed, published, *, selection=(), test=()):
    """Test rows at weight 1, selection rows by weight, and test rows of the weights chosen."""
    rows = both(arm, *published, method=method, weight=1.0, seed=seed)
    for weight, values in selection:
        rows += both(arm, *values, method=method, weight=weight, seed=seed, split="selection")
    for weight, values in test:
        rows += both(arm, *values, method=method, weight=weight, seed=seed)
    return rows


def single(arm, seed, first, second):
    return both(arm, first, second, seed=seed)


@pytest.fixture
def rows():
    """Two arms, two seeds; alone .8 and .6 on "default", .5 on "other"."""
    found = single("default", 0, 0.9, 0.7) + single("default", 1, 0.7, 0.5)
    # The sum: seed 0 chooses 0.4 (.6 against .5 on selection rows), seed 1 stays at 1.
    found += merge(
        "default", "task_arithmetic", 0, (0.5, 0.3),
        selection=[(1.0, (0.5, 0.5)), (0.4, (0.7, 0.5))], test=[(0.4, (0.7, 0.5))],
    )  # fmt: skip
    found += merge(
        "default", "task_arithmetic", 1, (0.5, 0.4),
        selection=[(1.0, (0.6, 0.4)), (0.4, (0.3, 0.5))],
    )  # fmt: skip
    found += merge("default", "ties", 0, (0.8, 0.6), selection=[(1.0, (0.9, 0.9))])
    found += merge("default", "ties", 1, (0.7, 0.5), selection=[(1.0, (0.9, 0.9))])
    found += merge("default", "emr", 0, (0.8, 0.8)) + merge("default", "emr", 1, (0.6, 0.6))
    found += single("other", 0, 0.5, 0.5)
    found += merge(
        "other", "task_arithmetic", 0, (0.4, 0.4),
        selection=[(1.0, (0.5, 0.5)), (0.4, (0.5, 0.5))],
    )  # fmt: skip
    return found


def line(table, label):
    return next(one for one in table.lines if one.label == label)


def test_as_published_and_at_the_weight_of_the_best_selection_score(rows):
    cell = line(method_table(rows, ["emr"]), "task_arithmetic").cell("default")
    assert cell.published.scores == pytest.approx({0: 0.4, 1: 0.45})
    assert cell.published.shares == pytest.approx({0: 0.5, 1: 0.75})
    assert cell.best.weights == {0: 0.4, 1: 1.0}
    assert cell.best.scores == pytest.approx({0: 0.6, 1: 0.45})
    assert cell.best.shares == pytest.approx({0: 0.75, 1: 0.75})
    assert cell.best.score is not None
    assert cell.best.score.mean == pytest.approx(0.525)
    assert cell.best.score.spread == pytest.approx(0.15 / 2**0.5)  # of .6 and .45


def test_of_weights_that_score_alike_the_one_closest_to_1(rows):
    cell = line(method_table(rows), "task_arithmetic").cell("other")
    assert cell.best.weights == {0: 1.0}


def test_the_order_is_that_of_the_best_weight_on_the_default_arm_and_masks_stand_apart(rows):
    table = method_table(rows, ["emr"])
    assert [one.label for one in table.shared] == ["ties", "task_arithmetic"]
    assert [one.label for one in table.per_task] == ["emr"]
    assert table.notices == ["other, seed 0, is not finished and left out of ties, emr."]


def test_a_seed_counts_once_every_task_is_scored(rows):
    rows.remove(next(r for r in rows if r.method == "ties" and r.seed == 1 and r.split == "test"))
    table = method_table(rows, ["emr"])
    assert line(table, "ties").cell("default").published.scores == pytest.approx({0: 0.7})
    assert "default, seed 1, is not finished and left out of ties." in table.notices
    assert "1 of 2 seeds" in markdown_methods(table)


def test_no_weight_is_chosen_while_a_candidate_is_not_scored(rows):
    gone = next(
        r for r in rows
        if r.method == "task_arithmetic" and r.seed == 1 and r.split == "selection"
        and r.weight == 0.4 and r.arm == "default"
    )  # fmt: skip
    rows.remove(gone)
    cell = line(method_table(rows), "task_arithmetic").cell("default")
    assert set(cell.best.scores) == {0}
    assert set(cell.published.scores) == {0, 1}


def test_a_method_that_is_finished_nowhere_is_left_out(rows):
    table = method_table([*rows, row("a", "default", 0.5, method="svd", weight=1.0)])
    assert "svd" not in [one.label for one in table.lines]
    assert "svd is not scored on every task yet and is left out." in table.notices


def test_options_make_a_method_another_line(rows):
    options = {"density": 0.5}
    more = both("default", 0.1, 0.1, method="ties", weight=1.0, options=options)
    labels = [one.label for one in method_table([*rows, *more]).lines]
    assert labels == ["emr", "ties", "task_arithmetic", "ties (density=0.5)"]


def test_a_difference_is_clear_in_every_seed_and_beyond_the_spread_of_the_sum(rows):
    table = method_table(rows, ["emr"])
    found = table.against_plain(line(table, "ties"), "default")
    assert found is not None
    assert found.by_seed == pytest.approx({0: 0.1, 1: 0.15})
    assert found.mean == pytest.approx(0.125)
    assert found.spread == pytest.approx(0.15 / 2**0.5)  # .106
    assert found.clear
    worse = [
        r for r in rows
        if not (r.method == "ties" and r.split == "test" and r.seed == 0)
    ] + merge("default", "ties", 0, (0.5, 0.5))  # fmt: skip
    table = method_table(worse, ["emr"])
    found = table.against_plain(line(table, "ties"), "default")
    assert found is not None
    assert found.by_seed == pytest.approx({0: -0.1, 1: 0.15})
    assert not found.clear
    assert table.against_plain(line(table, "ties"), "other") is None


def test_rows_of_another_learning_rate_and_without_a_score_are_no_part(rows):
    extra = both("default", 0.99, 0.99, seed=0, rate=0.5, split="selection")
    extra += [row("a", "default", float("nan"), method="ties", weight=1.0, seed=7)]
    assert methods_json(method_table([*extra, *rows])) == methods_json(method_table(rows))


def test_the_markdown_says_score_share_and_weight(rows):
    text = markdown_methods(method_table(rows, ["emr"]))
    lines = text.splitlines()
    assert lines[0].startswith("Mean score × 100 over 2 tasks")
    assert lines[2].split(" | ")[:3] == [
        "| method", "default, as published", "default, best weight",
    ]  # fmt: skip
    assert "| each adapter alone | 70.0 ± 14.1 |  | 50.0 |  |" in lines
    assert (
        "| task_arithmetic | 42.5 ± 3.5 (62 ± 18 %) | 52.5 ± 10.6 (75 ± 0 %) at 0.4, 1 "
        "| 40.0 (80 %) | 40.0 (80 %) at 1 |"
    ) in lines
    assert "| emr | 70.0 ± 14.1 (100 ± 0 %) | – |" in lines


def test_nothing_at_all_is_no_table():
    table = method_table([])
    assert table.lines == []
    assert "|" not in markdown_methods(table)


def test_the_command_prints_it(rows, tmp_path):
    append_rows(tmp_path / "results.jsonl", rows)
    assert call("report", tmp_path, "--by-method", "--markdown") == markdown_methods(
        method_table(rows, ["emr", "tall_masks"])
    )
    found = json.loads(call("report", tmp_path, "--by-method", "--json"))
    assert {e["method"] for e in found} == {"ties", "task_arithmetic", "emr"}
    text = call("report", tmp_path, "--by-method")
    assert "52.5 ± 10.6" in text
    assert not (tmp_path / "report.html").exists()
