"""Data, statistics, training and merging draw under seeds of their own, which are recorded."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_recipe import execute, make_recipe, untimed

from orthomerge.experiment import parse_recipe
from orthomerge.experiment.choices import asked
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.steps import StartStep, TrainStep


@pytest.fixture
def small(tiny_base, tmp_path):
    """One start, one merge that draws."""
    values = make_recipe(tmp_path / "tasks", tiny_base)
    values["arms"] = {"default": {"start": "default"}}
    values["merges"] = [{"method": "dare_linear"}]
    return values


def keys_of(values, output):
    exp = Experiment(parse_recipe(values), output)
    rows = {key for step in asked(exp, {}) for key in exp.row_keys(step).values()}
    steps = (StartStep("default", "one", 0), TrainStep("default", "one", 0, 5e-3))
    return rows, *(step.path(exp) for step in steps), exp.data["one"].fingerprint


def test_each_seed_moves_what_it_is_for_and_nothing_before_it(small, tmp_path):
    rows, start, adapter, data = keys_of(small, tmp_path)
    training = keys_of({**small, "training": {**small["training"], "seed": 3}}, tmp_path)
    assert training[1] == start and training[2] != adapter and not training[0] & rows
    merging = keys_of({**small, "merges": [{"method": "dare_linear", "seed": 3}]}, tmp_path)
    assert merging[1:] == (start, adapter, data)
    assert len(merging[0] & rows) == len(rows) // 2  # the adapters alone
    drawn = keys_of({**small, "data": {**small["data"], "seed": 3}}, tmp_path)
    assert drawn[3] != data and drawn[1] == start and drawn[2] != adapter


def test_the_record_names_every_seed_and_rows_repeat_to_the_bit(small, tmp_path):
    values = {**small, "training": {**small["training"], "seed": 3}}
    rows = execute(values, tmp_path / "one")
    assert untimed(rows) == untimed(execute(values, tmp_path / "two"))
    seeds = json.loads((tmp_path / "one" / "run.json").read_text(encoding="utf-8"))["seeds"]
    assert seeds == {
        "runs": {"default": [0]}, "data": 0, "statistics": 0, "training": 3,
        "merges": [["dare_linear", None]],
    }  # fmt: skip


def test_the_number_of_threads_changes_no_score(small, tmp_path):
    """Weights may differ in the last bits, as sums are split otherwise; see docs/numerics.md."""
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found[threads] = execute(small, tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    for threads in (2, 4):
        for one, other in zip(found[1], found[threads], strict=True):
            assert other.key == one.key
            assert other.value == pytest.approx(one.value, abs=1e-4)
