"""`orthomerge stats fisher` on a tiny adapter: what it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from conftest import call, write_task
from small_adapters import make_adapter

from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, OrthomergeError
from orthomerge.fisher import load_fisher
from orthomerge.merging import merge_layers


@pytest.fixture(scope="module")
def adapted(tiny_base, tmp_path_factory):
    """An adapter's folder and its task's file."""
    folder = tmp_path_factory.mktemp("fisher")
    return make_adapter(folder / "a", tiny_base, 1), write_task(folder / "task.jsonl", seed=3)


def test_the_command_writes_what_the_library_reads(adapted, tmp_path):
    folder, task = adapted
    file = tmp_path / "a.fisher.safetensors"
    said = call("stats", "fisher", folder, "--task", task, "--samples", 7, "-o", file, "--json")
    assert json.loads(said)["samples"] == 7
    read = read_adapter(folder)
    found = load_fisher(file, adapter_sha256=read.sha256)
    assert found.meta.task == "task"
    assert {n: tuple(v.shape) for n, v in found.items()} == {
        n: f.shape for n, f in read.layers.items()
    }
    merged = merge_layers([read.layers] * 2, method="fisher", fisher=[found] * 2)
    assert set(merged.layers) == set(found)
    before = file.read_bytes()
    assert "4 layers on 7 rows" in call(
        "stats", "fisher", folder, "--task", task, "--samples", 7, "-o", file, "--batch-size", 16
    )
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--task", "sentimnt"], "did you mean 'sentiment'"),
        (["--samples", "5000"], "not 5000"),
        (["--base", "./nowhere", "--samples", "4"], "no model"),
    ],
)
def test_a_mistake_writes_nothing(adapted, tmp_path, change, word):
    folder, task = adapted
    with pytest.raises(OrthomergeError, match=word):
        call("stats", "fisher", folder, "--task", task, "-o", tmp_path / "f", *change)
    assert not list(tmp_path.iterdir())


def test_a_head_for_other_labels_is_refused(adapted, tmp_path):
    task = write_task(tmp_path / "values.jsonl", regression=True)
    with pytest.raises(AdapterError, match="other labels"):
        call("stats", "fisher", adapted[0], "--task", task, "--samples", 4, "-o", tmp_path / "f")
    assert not (tmp_path / "f").exists()
