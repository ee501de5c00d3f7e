"""The graph of a recipe: it grows with the rows, and its keys are those of kept results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import write_task

from orthomerge.experiment import load_recipe, parse_recipe
from orthomerge.experiment.graph import Graph
from orthomerge.experiment.jobs import KINDS
from orthomerge.experiment.keys import Keys
from orthomerge.io.rows import ResultRow, read_rows

ROOT = Path(__file__).resolve().parents[2]
ROW = ResultRow(
    task="", arm="", start="default", solver=None, granularity=None, constraint="init",
    learning_rate=1.0, method="single", weight=None, metric="accuracy", value=0.5, seed=0, n=1,
    split="test", key="",
)  # fmt: skip


@pytest.fixture
def graph(tiny_base, tmp_path):
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
    return Graph(Keys(parse_recipe(values), tmp_path / "out"))


def answered(evaluations, value):
    """Rows for evaluations, their scores as `value(evaluation)` says."""
    return {
        key: dataclasses.replace(ROW, key=key, value=value(asked))
        for asked in evaluations
        for _, key in asked.keys
    }


def test_it_grows_until_nothing_is_left_to_decide(graph):
    whole = graph.evaluations({}, assume=True)
    rows, sizes = {}, []
    while missing := [
        a for a in graph.evaluations(rows) if not set(dict(a.keys).values()) <= set(rows)
    ]:
        # The higher rate, and of a merge the lower weight, are the better ones.
        rows |= answered(missing, lambda a: a.rate - (a.weight or 0))
        sizes.append(len(missing))
    # Two arms, two tasks: two rates on selection rows; then for both seeds the singles, two
    # weights of one merge, and two candidates and the weight 1 of the other; then the chosen one.
    assert sizes == [2 * 2 * 2, 2 * 2 * (2 + 2 + 2 + 1), 2 * 2]
    final = graph.evaluations(rows)
    assert len(final) == len(whole) == sum(sizes)
    assert {a.rate for a in final if a.split == "test"} == {5e-3}
    tested = {a.weight for a in final if a.split == "test" and a.merge == 1}
    assert tested == {1.0, 0.3}
    # The order is the recipe's: an arm after the other, seeds within it, however rows came in.
    assert [(a.arm, a.seed) for a in final if a.split == "test"] == sorted(
        (a.arm, a.seed) for a in final if a.split == "test"
    )
    shuffled = dict(sorted(rows.items()))
    assert graph.evaluations(shuffled) == final


def test_every_job_comes_after_what_it_needs_and_only_once(graph):
    evaluations = graph.evaluations({}, assume=True)
    jobs = graph.jobs(evaluations, {}, lambda path: False)
    seen = set()
    for job in jobs.values():
        assert set(job.needs) <= seen
        seen.add(job.id)
    kinds = [job.kind for job in jobs.values()]
    assert set(kinds) == set(KINDS)
    # Statistics of two tasks; starts of two tasks, seeds and arms; trainings at two rates for the
    # first seed and at the chosen one for the second; Fisher information at the chosen one.
    assert [kinds.count(k) for k in KINDS] == [2, 8, 12, 8, 16, 24]


def test_what_is_there_needs_no_job_nor_does_what_only_it_needed(graph):
    evaluations = graph.evaluations({}, assume=True)
    assert not graph.jobs(evaluations, answered(evaluations, lambda a: 0.0), lambda path: False)
    lost = next(a for a in evaluations if a.merge == 0 and a.arm == "default")
    kept = answered([a for a in evaluations if a is not lost], lambda a: 0.0)
    kinds = [job.kind for job in graph.jobs(evaluations, kept, lambda path: False).values()]
    assert kinds == ["start", "train", "start", "train", "stats", "stats", "merge"]
    adapters = graph.jobs(evaluations, kept, lambda path: "adapters" in path.parts)
    assert [job.kind for job in adapters.values()] == ["stats", "stats", "merge"]


@pytest.mark.parametrize("name", ["limits-samples", "limits-sixteen", "limits-all-linear"])
def test_rows_kept_by_earlier_versions_are_still_the_recipes(name, tmp_path):
    """What makes a change of a key, which would orphan every kept row, impossible to miss."""
    recipe, _ = load_recipe(ROOT / "results" / name / "recipe.yaml")
    graph = Graph(Keys(recipe, tmp_path))
    rows = {row.key: row for row in read_rows(ROOT / "results" / name / "results.jsonl")}
    assert [k for asked in graph.evaluations(rows) for _, k in asked.keys] == list(rows)
