"""The graph of a recipe: it grows with the rows, and its keys are those of kept results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import write_task

from orthomerge.experiment import load_recipe, parse_recipe
from orthomerge.experiment.choices import asked, steps_behind
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.steps import KINDS, MergeStep
from orthomerge.io.rows import ResultRow, read_rows

ROOT = Path(__file__).resolve().parents[2]
ROW = ResultRow(
    task="", arm="", start="default", solver=None, granularity=None, constraint="init",
    learning_rate=1.0, method="single", weight=None, metric="accuracy", value=0.5, seed=0, n=1,
    split="test", key="",
)  # fmt: skip


@pytest.fixture
def exp(tiny_base, tmp_path):
    tasks = [str(write_task(tmp_path / f"{name}.jsonl", seed=1)) for name in ("one", "two")]
    values = {
        "name": "tiny",
        "base": str(tiny_base),
        "tasks": tasks,
        "seeds": [0, 1],
        "data": {"train": 24, "selection": 12, "test": 16, "max_length": 16},
        "training": {"learning_rate": [1e-3, 5e-3]},
        "arms": {"default": {"start": "default"}, "osrm": {"start": "min_eigen"}},
        "merges": [
            {"method": "regmean", "weights": [0.5, 1.0]},
            {"method": "fisher", "choose_from": [0.3]},
        ],
    }
    return Experiment(parse_recipe(values), tmp_path / "out")


def keys_of(exp, steps):
    return [key for step in steps for key in exp.row_keys(step).values()]


def answered(exp, steps, value):
    """Rows for evaluations, their scores as `value(step)` says."""
    return {
        key: dataclasses.replace(ROW, key=key, value=value(step))
        for step in steps
        for key in keys_of(exp, [step])
    }


def test_it_grows_until_nothing_is_left_to_decide(exp):
    whole = asked(exp, {}, assume=True)
    rows, sizes = {}, []
    while missing := [step for step in asked(exp, rows) if step.missing(exp, rows)]:
        # The higher rate, and of a merge the lower weight, are the better ones.
        rows |= answered(exp, missing, lambda s: s.rate - getattr(s, "weight", 0))
        sizes.append(len(missing))
    # Two arms, two tasks: two rates on selection rows; then for both seeds the singles, two
    # weights of one merge, and two candidates and the weight 1 of the other; then the chosen one.
    assert sizes == [2 * 2 * 2, 2 * 2 * (2 + 2 + 2 + 1), 2 * 2]
    final = asked(exp, rows)
    assert len(final) == len(whole) == sum(sizes)
    assert {s.rate for s in final if s.split == "test"} == {5e-3}
    merges = [s for s in final if isinstance(s, MergeStep) and s.split == "test"]
    assert {s.weight for s in merges if s.place == 1} == {1.0, 0.3}
    # The order is the recipe's: an arm after the other, seeds within it, however rows came in.
    assert [(s.arm, s.seed) for s in final if s.split == "test"] == sorted(
        (s.arm, s.seed) for s in final if s.split == "test"
    )
    assert asked(exp, dict(sorted(rows.items()))) == final


def test_every_step_comes_after_what_it_needs_and_only_once(exp):
    steps = steps_behind(exp, asked(exp, {}, assume=True), {}, lambda path: False)
    seen = set()
    for name, step in steps.items():
        assert {need.name(exp) for need in step.needs(exp)} <= seen
        seen.add(name)
    kinds = [step.kind for step in steps.values()]
    # Statistics of two tasks; starts of two tasks, seeds and arms; trainings at two rates for the
    # first seed and at the chosen one for the second; Fisher information at the chosen one.
    counts = {"stats": 2, "start": 8, "train": 12, "fisher": 8, "eval": 16, "merge": 24}
    assert {
        kind: kinds.count(kind) for kind in KINDS if kind not in ("convert", "distill")
    } == counts
    assert len(kinds) == sum(counts.values())


def test_what_is_there_needs_no_step_nor_does_what_only_it_needed(exp):
    evaluations = asked(exp, {}, assume=True)
    rows = answered(exp, evaluations, lambda s: 0.0)
    assert not steps_behind(exp, evaluations, rows, lambda path: False)
    lost = next(s for s in evaluations if isinstance(s, MergeStep) and s.arm == "default")
    kept = answered(exp, [s for s in evaluations if s is not lost], lambda s: 0.0)
    steps = steps_behind(exp, evaluations, kept, lambda path: False)
    kinds = [step.kind for step in steps.values()]
    assert kinds == ["start", "train", "start", "train", "stats", "stats", "merge"]
    steps = steps_behind(exp, evaluations, kept, lambda path: "adapters" in path.parts)
    assert [step.kind for step in steps.values()] == ["stats", "stats", "merge"]


@pytest.mark.parametrize("name", ["limits-samples", "limits-sixteen", "limits-all-linear"])
def test_rows_kept_by_earlier_versions_are_still_the_recipes(name, tmp_path):
    """What makes a change of a key, which would orphan every kept row, impossible to miss."""
    recipe, _ = load_recipe(ROOT / "results" / name / "recipe.yaml")
    exp = Experiment(recipe, tmp_path)
    rows = {row.key: row for row in read_rows(ROOT / "results" / name / "results.jsonl")}
    assert keys_of(exp, asked(exp, rows)) == list(rows)
