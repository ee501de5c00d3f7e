"""The output of a merge: whole or absent, heads as the user says, one adapter per task, hub ids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from peft_oracle import bert, llama, loaded, outputs, save_adapter, weights
from safetensors.torch import load_file

from orthomerge.adapters import merge_adapters, read_adapter, read_head, save_merged
from orthomerge.errors import AdapterError, OutputError
from orthomerge.io.tensors import LazyTensors, TensorWriter, open_tensors
from orthomerge.records import read_record

HEADED = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


@pytest.fixture
def two(tmp_path):
    """Two adapters with heads."""
    return [save_adapter(tmp_path / n, bert, i, **HEADED) for i, n in enumerate("ab")]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Heads ------------------------------------------------------------------------------------------


def test_heads_are_kept_by_task_unless_told_otherwise(two, tmp_path):
    merge_adapters(two, output=tmp_path / "out")
    assert not read_adapter(tmp_path / "out").modules
    for folder in two:
        kept = read_head(tmp_path / "out" / "heads" / f"{folder.name}.safetensors")
        own = read_adapter(folder).modules
        assert set(kept) == set(own) == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(kept[k], own[k]) for k in kept)


def test_averaged_heads_are_loaded_by_peft(two, tmp_path):
    merge_adapters(two, heads="average", output=tmp_path / "out")
    model = loaded(tmp_path / "out", bert)
    head = model.base_model.model.classifier.modules_to_save["default"]
    own = [read_adapter(folder).modules["classifier.weight"] for folder in two]
    torch.testing.assert_close(head.weight.data, (own[0] + own[1]) / 2)
    assert not (tmp_path / "out" / "heads").exists()


def test_averaged_modules_to_save_of_a_causal_model(tmp_path):
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    folders = [save_adapter(tmp_path / n, llama, i, **config) for i, n in enumerate("ab")]
    merge_adapters(folders, heads="average", output=tmp_path / "out")
    mean, parts = weights(tmp_path / "out", llama), [weights(f, llama) for f in folders]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(mean[name], (parts[0][name] + parts[1][name]) / 2)


def test_heads_that_are_refused_or_do_not_fit(two, tmp_path):
    with pytest.raises(AdapterError, match="--heads keep"):
        merge_adapters(two, heads="refuse", output=tmp_path / "out")
    with pytest.raises(AdapterError, match="did you mean 'average'"):
        merge_adapters(two, heads="averages", output=tmp_path / "out")
    from conftest import tiny_bert

    wide = save_adapter(tmp_path / "wide", lambda: tiny_bert(labels=3), 3, **HEADED)
    with pytest.raises(AdapterError) as caught:
        merge_adapters([*two, wide], heads="average", output=tmp_path / "out")
    for word in ("classifier", "[2", "[3", str(wide), "cannot be averaged"):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()
    merge_adapters([*two, wide], output=tmp_path / "out")  # kept apart they may differ


# An adapter a task ------------------------------------------------------------------------------


def test_a_method_that_leaves_an_update_a_task_gives_an_adapter_a_task(two, tmp_path):
    merged = merge_adapters(two, method="emr", rank=6, output=tmp_path / "out")
    in_memory = merge_adapters(two, method="emr", rank=6)
    assert len(merged.tasks) == 2
    for task, folder in enumerate(two):
        path = tmp_path / "out" / "tasks" / folder.name
        model = loaded(path, bert)
        head = model.base_model.model.classifier.modules_to_save["default"]
        own = read_adapter(folder)
        assert torch.equal(head.weight, own.modules["classifier.weight"])
        for name, update in read_adapter(path).layers.items():
            expected = in_memory.of(task)[name].delta()
            torch.testing.assert_close(update.delta(), expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(merged.of(task)[name].delta(), update.delta())
        assert outputs(model).isfinite().all()
    assert "tasks/" in (tmp_path / "out" / "README.md").read_text()


def test_two_adapters_of_one_name_stay_two_tasks(tmp_path):
    folders = [
        save_adapter(tmp_path / n / "adapter", bert, i, **HEADED) for i, n in enumerate("ab")
    ]
    merge_adapters(folders, method="emr", output=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "tasks").iterdir()) == [
        "adapter", "adapter-2"
    ]  # fmt: skip


# Whole or absent --------------------------------------------------------------------------------


def test_what_is_returned_reads_what_was_written_and_equals_the_merge_in_memory(two, tmp_path):
    written = merge_adapters(two, method="ties", output=tmp_path / "out", density=0.5)
    in_memory = merge_adapters(two, method="ties", density=0.5)
    for name in in_memory.layers:
        torch.testing.assert_close(written.dense(name), in_memory.dense(name), atol=1e-6, rtol=1e-5)
    again = merge_adapters(two, method="ties", workers=2, output=tmp_path / "two", density=0.5)
    assert all(torch.equal(again.dense(n), written.dense(n)) for n in written.layers)


def test_a_folder_that_is_not_empty_is_replaced_only_when_told(two, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    merge_adapters(two, output=target)  # an empty folder is free
    before = listing(target)
    with pytest.raises(AdapterError, match=r"not empty.*--overwrite"):
        merge_adapters(two, output=target)
    assert listing(target) == before
    merge_adapters(two, weights=0.5, output=target, overwrite=True)
    assert (target / "merge.json").read_bytes() != before["merge.json"]
    with pytest.raises(AdapterError, match="is a file"):
        merge_adapters(two, output=target / "README.md", overwrite=True)


@pytest.mark.parametrize("when", [1, 3])
def test_an_interrupt_leaves_nothing_or_what_was_there(two, tmp_path, when):
    def stop(done, _of):
        if done == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapters(two, output=tmp_path / "out", progress=stop)
    merge_adapters(two, output=tmp_path / "old")
    before = listing(tmp_path / "old")
    with pytest.raises(KeyboardInterrupt):
        merge_adapters(two, output=tmp_path / "old", overwrite=True, progress=stop)
    assert listing(tmp_path / "old") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "old"]


_SLOW = """
import sys, time
from orthomerge.adapters import merge_adapters
def wait(done, of):
    print("layer", done, flush=True)
    time.sleep(0.2)
merge_adapters(sys.argv[1:3], output=sys.argv[3], overwrite=True, progress=wait)
"""


@pytest.mark.parametrize("old", [False, True])
def test_a_killed_process_leaves_the_output_absent_or_as_it_was(two, tmp_path, old):
    target = tmp_path / "out"
    before = {}
    if old:
        merge_adapters(two, weights=2, output=target)
        before = listing(target)
    command = [sys.executable, "-c", _SLOW, str(two[0]), str(two[1]), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "layer 2" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (listing(target) == before) if old else not target.exists()
    began = time.perf_counter()
    merge_adapters(two, output=target, overwrite=True)  # what it left does not stand in the way
    assert time.perf_counter() - began < 60
    assert read_adapter(target).layers


def test_a_merge_never_replaces_one_of_its_inputs(two, tmp_path):
    before = listing(tmp_path)
    read = [read_adapter(item) for item in two]
    for inputs in (two, read):
        with pytest.raises(OutputError, match="is the input"):
            merge_adapters(inputs, output=two[0], overwrite=True)
    with pytest.raises(OutputError, match="is the input"):
        save_merged(two[0], merge_adapters(two), read, [1, 1], overwrite=True)
    assert listing(tmp_path) == before


def test_tensors_written_one_by_one_are_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 4), "é": torch.randn(2, 3, dtype=torch.bfloat16).T,
        "empty": torch.zeros(0, 5), "scalar": torch.tensor(7, dtype=torch.int64),
        "flag": torch.tensor([True, False]),
    }  # fmt: skip
    with TensorWriter(tmp_path / "x.safetensors", [*tensors, "never added"]) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    read = load_file(tmp_path / "x.safetensors")
    lazy = LazyTensors(open_tensors(tmp_path / "x.safetensors"))
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
        assert torch.equal(lazy[name], tensor)


# The hub ----------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_without_its_pickles(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def fake(repo, **options):
        asked.append((repo, options))
        return str(two[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    adapter = read_adapter("org/some-adapter@v1.0")
    assert adapter.name == "some-adapter"
    assert adapter.source == f"org/some-adapter@{two[0].name}"
    (repo, options), = asked  # fmt: skip
    assert (repo, options["revision"]) == ("org/some-adapter", "v1.0")
    allowed = options["allow_patterns"]
    assert {"README.md", "adapter_config.json", "*.safetensors", "tokenizer.json"} <= set(allowed)
    assert not any(fnmatch(f"adapter_model.{end}", p) for end in ("bin", "pt") for p in allowed)
    merge_adapters(["org/some-adapter", two[1]], output=tmp_path / "out")
    assert asked[1][1]["revision"] is None
    # A folder of that name comes first, and what is plainly a path is never asked for.
    (tmp_path / "org").mkdir()
    two[0].rename(tmp_path / "org" / "some-adapter")
    assert read_adapter("org/some-adapter").name == "some-adapter"
    for path in ("./org/none", str(tmp_path / "none"), "one"):
        with pytest.raises(AdapterError, match="no adapter at"):
            read_adapter(path)
    assert len(asked) == 2


def test_an_id_in_the_local_cache_is_read_offline_and_others_are_one_sentence(
    two, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--org--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    two[0].rename(repo / "snapshots" / commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merged = merge_adapters(["org/mine", two[1]], output=tmp_path / "out")
    assert merged.layers
    assert f"org/mine@{commit}" in (tmp_path / "out" / "merge.json").read_text()
    with pytest.raises(AdapterError) as caught:
        read_adapter("org/other")
    assert "no adapter 'org/other'" in str(caught.value)
    assert "\n" not in str(caught.value)


# Ranks ------------------------------------------------------------------------------------------


def test_a_dense_update_is_cut_to_the_ranks_of_the_adapters_unless_told_otherwise(tmp_path):
    folders = [
        save_adapter(tmp_path / n, bert, i, target_modules=["query", "value"], r=4)
        for i, n in enumerate("ab")
    ]
    exact = merge_adapters(folders, method="ties", rank="full")
    cut = merge_adapters(folders, method="ties", output=tmp_path / "out")
    record = read_record(tmp_path / "out")[1]
    assert record["rank"] == "sum" and record["truncation_error"] == cut.truncation_error
    card = (tmp_path / "out" / "README.md").read_text()
    worst = max(cut.truncation_error.values())
    assert f"cut to the sum of the adapters' ranks, which took at most {worst:.1%}" in card
    for name, own in updates(tmp_path / "out").items():
        assert cut.layers[name].rank == 8
        left = torch.linalg.svdvals(exact.dense(name).double())[8:].norm()
        lost = torch.linalg.norm(own - exact.dense(name))
        assert lost <= left * 1.001 + 1e-6
        whole = torch.linalg.norm(exact.dense(name))
        assert cut.truncation_error[name] == pytest.approx(float(lost / whole), rel=1e-3)
    merge_adapters(folders, method="ties", rank="full", output=tmp_path / "full")
    for name, own in updates(tmp_path / "full").items():
        torch.testing.assert_close(own, exact.dense(name).double(), atol=1e-6, rtol=1e-5)
    assert "cut to" not in (tmp_path / "full" / "README.md").read_text()
    assert read_record(tmp_path / "full")[1]["truncation_error"] == {}


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to the base's weights, by layer."""
    merged, plain = weights(folder, bert), bert().state_dict()
    names = list(read_adapter(folder).layers)
    return {n: merged[f"{n}.weight"] - plain[f"{n}.weight"].double() for n in names}
