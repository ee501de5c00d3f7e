"""Data sets by Datasets: a folder as the hub holds it, and one that `save_to_disk` wrote."""

from __future__ import annotations

import datasets
import pytest
from conftest import call, make_texts

import orthomerge
from orthomerge.errors import StatisticsError
from orthomerge.statistics import read_texts

TEXTS = make_texts(12)


def saved(folder, kind):
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * 12})
    both = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    if kind == "parquet":  # what push_to_hub lays out
        for split, part in both.items():
            part.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    elif kind == "split":
        rows.save_to_disk(folder)
    else:
        both.save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "split", "splits"])
def test_texts_are_read_and_statistics_taken_by_the_folders_path(tmp_path, tiny_base, kind):
    folder = saved(tmp_path / "set", kind)
    assert read_texts(folder) == [(text, None) for text in TEXTS]
    for name, data in (("folder", folder), ("file", tmp_path / "same.jsonl")):
        datasets.Dataset.from_dict({"text": TEXTS}).to_json(tmp_path / "same.jsonl")
        call("stats", tiny_base, "--data", data, "--output", tmp_path / f"{name}.stats.safetensors")
    one, other = (
        orthomerge.Statistics.load(tmp_path / f"{n}.stats.safetensors") for n in ("folder", "file")
    )
    for layer in one.layers:
        assert one.second_moment(layer).allclose(other.second_moment(layer), atol=1e-9)


def test_a_saved_set_without_a_training_split_is_one_sentence(tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "set")
    with pytest.raises(StatisticsError, match="train") as problem:
        read_texts(tmp_path / "set")
    assert "\n" not in str(problem.value)
