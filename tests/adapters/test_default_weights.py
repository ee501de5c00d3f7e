"""Weights where the user gives none: what the adapters' records say decides."""

from __future__ import annotations

import json

import pytest
from conftest import call
from small_adapters import make_adapter

from orthomerge.adapters import merge_adapters, merge_to_model, read_adapter
from orthomerge.records import read_record

SUMMED = [
    ("training.json", {"constraint": "project"}),
    ("training.json", {"constraint": "penalty", "losses": []}),
    ("training.json", {"constraint": "freeze"}),
    ("start.json", {"config": {"constraint": "project"}}),
    ("convert.json", {"config": {"subspace": "quiet"}}),
    ("convert.json", {"config": {"subspace": "low_energy"}}),
]
USUAL = [
    ("training.json", {"constraint": "init"}),
    ("training.json", {"losses": []}),
    ("training.json", ["of", "another", "program"]),
    ("start.json", {"config": None}),
    ("convert.json", {"config": {"subspace": "project"}}),
]


@pytest.fixture
def pair(tiny_base, tmp_path):
    return [make_adapter(tmp_path / name, tiny_base, seed) for seed, name in enumerate("ab")]


def merged(pair, tmp_path, **how):
    merge_adapters(pair, output=tmp_path / "out", **how)
    record = read_record(tmp_path / "out")[1]
    return [a["weight"] for a in record["adapters"]], record.get("weights_reason")


def test_adapters_without_a_record_are_summed_at_one_over_the_root_of_their_number(pair, tmp_path):
    weights, reason = merged(pair, tmp_path)
    assert weights == [pytest.approx(0.5**0.5)] * 2 and reason.startswith("1/√2 = 0.707")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The weight is {reason}." in card and "| 0.707107 |" in card
    assert merge_adapters(pair).config.weights == tuple(weights)


@pytest.mark.parametrize(("file", "record"), SUMMED, ids=str)
def test_adapters_made_to_be_summed_are_summed_as_they_are(pair, tmp_path, file, record):
    for folder in pair:
        (folder / file).write_text(json.dumps(record))
    weights, reason = merged(pair, tmp_path)
    assert weights == [1, 1] and "made to be summed" in reason
    merge_to_model(pair, tmp_path / "model")
    assert read_record(tmp_path / "model")[1]["weights_reason"] == reason


@pytest.mark.parametrize(("file", "record"), USUAL, ids=str)
def test_any_adapter_that_was_not_makes_it_the_usual_weight(pair, tmp_path, file, record):
    (pair[0] / "training.json").write_text('{"constraint": "project"}')
    (pair[1] / file).write_text(json.dumps(record))
    assert merged(pair, tmp_path)[0] == [pytest.approx(0.5**0.5)] * 2


def test_a_record_that_is_no_json_says_nothing(pair, tmp_path):
    for folder in pair:
        (folder / "training.json").write_text("{")
    assert merged(pair, tmp_path)[0] == [pytest.approx(0.5**0.5)] * 2


def test_a_training_says_more_than_the_start_that_it_went_on_from(pair, tmp_path):
    for folder in pair:
        (folder / "start.json").write_text('{"config": {"constraint": "project"}}')
        (folder / "training.json").write_text('{"constraint": "init"}')
    assert merged(pair, tmp_path)[0] == [pytest.approx(0.5**0.5)] * 2


def test_methods_that_average_and_weights_that_are_given(pair, tmp_path):
    weights, reason = merged(pair, tmp_path, method="ties")
    assert weights == [1, 1] and "'ties' keeps the size" in reason
    weights, reason = merged(pair, tmp_path, method="pico", overwrite=True)
    assert weights == [0.5, 0.5] and reason.startswith("1/2 = 0.5, as 'pico' adds up")
    assert merged(pair, tmp_path, weights=0.3, overwrite=True) == ([0.3, 0.3], None)
    weights, reason = merged(pair[:1], tmp_path, overwrite=True)
    assert weights == [1] and "single adapter" in reason


def test_the_command_says_which_weight_it_took_and_why(pair, tmp_path):
    said = call("merge", *pair, "--output", tmp_path / "one")
    assert "note: weight 1/√2 = 0.707" in said and "--weights decides otherwise" in said
    assert "note:" not in call("merge", *pair, "--weights", 1, "--output", tmp_path / "two")
    found = json.loads(call("merge", *pair, "--output", tmp_path / "three", "--json"))
    assert found["weights"] == [pytest.approx(0.5**0.5)] * 2
    assert found["weights_reason"].startswith("1/√2")
    a, b = (read_adapter(p).layers for p in pair)
    for name, factors in read_adapter(tmp_path / "one").layers.items():
        expected = (a[name].delta() + b[name].delta()) * 0.5**0.5
        assert factors.delta().sub(expected).norm() < 1e-5 * expected.norm()
