"""`orthomerge diagnose` and `merge --tune statistics` as a user types them."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call, make_texts, tiny_bert, write_task
from small_adapters import make_adapter

from orthomerge.adapters import read_adapter
from orthomerge.diagnostics import best_weight, best_weight_of_sum, couplings
from orthomerge.errors import OrthomergeError
from orthomerge.statistics import Statistics, collect_statistics


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """Two random adapters of a tiny base and the statistics of two tasks."""
    folder = tmp_path_factory.mktemp("diagnose")
    for seed, name in enumerate("ab"):
        make_adapter(folder / name, tiny_base, seed)
        write_task(folder / f"{name}.jsonl", seed=seed)
        texts = folder / f"{name}-texts.jsonl"
        texts.write_text("\n".join(json.dumps({"text": t}) for t in make_texts(12, seed)))
        call("stats", tiny_base, "--data", texts, "--samples", 12,
             "--output", folder / f"{name}.stats.safetensors")  # fmt: skip
    return folder


def with_stats(files):
    return [files / "a", files / "b", "--stats", files / "a.stats.safetensors",
            "--stats", files / "b.stats.safetensors"]  # fmt: skip


def test_without_statistics_it_compares_the_adapters_alone(files):
    said = call("diagnose", files / "a", files / "b")
    assert "sign conflict" in said and "--stats" in said
    assert "interference" not in said.replace("predicts", "")
    found = json.loads(call("diagnose", files / "a", files / "b", "--json"))
    assert found["adapters"] == ["a", "b"]
    assert found["overlap"]["cosine"][0][0] == pytest.approx(1)


def test_with_statistics_it_predicts_the_shift_of_merges_at_their_best_weights(files):
    said = call("diagnose", *with_stats(files), "--method", "tsv_m")
    for words in ("interference", "predicted shift", "tsv_m", "share of the shift", "correlation"):
        assert words in said, words
    found = json.loads(call("diagnose", *with_stats(files), "--method", "ties",
                            "--option", "density=0.5", "--json"))  # fmt: skip
    assert set(found["shift"]) == {"task_arithmetic", "ties"}
    for shift in found["shift"].values():
        assert shift["at_best"]["mean"] <= shift["at_1"]["mean"]
    layers = sum(item["shift"] for item in found["loudest_layers"])
    assert layers == pytest.approx(found["shift"]["task_arithmetic"]["at_1"]["mean"])


def test_every_method_gets_the_options_that_it_has_and_one_that_none_has_is_refused(files):
    ask = ["diagnose", *with_stats(files), "--method", "core_space", "--method", "ties",
           "--option", "inner=svd", "--option", "rank=1", "--json"]  # fmt: skip
    found = json.loads(call(*ask, "--option", "density=0.9"))["shift"]
    other = json.loads(call(*ask, "--option", "density=0.1"))["shift"]
    assert found["core_space"] == other["core_space"]  # svd has no density
    assert found["ties"] != other["ties"]
    adapters = [files / "a", files / "b"]
    stats = [files / f"{name}.stats.safetensors" for name in "ab"]
    alone = best_weight([read_adapter(a) for a in adapters], [Statistics.load(s) for s in stats],
                        method="svd", rank=1)  # fmt: skip
    assert found["core_space"]["at_best"]["mean"] == pytest.approx(alone.shift.mean, rel=1e-5)
    with pytest.raises(OrthomergeError, match="'densty' in the methods core_space, ties: did you"):
        call(*ask, "--option", "densty=1")


@pytest.mark.parametrize("method", ["task_arithmetic", "regmean"])
def test_the_weight_of_least_predicted_shift_goes_into_the_merge(files, tmp_path, method):
    call("merge", *with_stats(files), "--method", method, "--tune", "statistics",
         "--output", tmp_path / "m")  # fmt: skip
    record = json.loads((tmp_path / "m" / "merge.json").read_text())
    weights = {a["weight"] for a in record["adapters"]}
    assert len(weights) == 1
    if method == "task_arithmetic":
        stats = [files / f"{n}.stats.safetensors" for n in "ab"]
        read = [read_adapter(files / n) for n in "ab"]
        assert weights.pop() == pytest.approx(
            best_weight_of_sum(couplings(read, stats)).weight, abs=0.05
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["diagnose", "a", "b", "--stats", "a.stats.safetensors"], ["2 adapters and 1 statistics"]),
        (["diagnose", "a", "b", "--method", "ties"], ["--stats"]),
        (["diagnose", "a", "gone"], ["gone"]),
        (["merge", "a", "b", "--tune", "statistics"], ["--stats"]),
        (["merge", "a", "b", "--tune", "statistcs"], ["'statistics'"]),
        (["merge", "a", "b", "--tune", "statistics", "--task", "x"], ["--tune validation"]),
        (["merge", "a", "b", "--task", "x"], ["--tune"]),
        (["merge", "a", "b", "--tune", "validation"], ["--task"]),
        (["merge", "a", "b", "--tune", "statistics", "--weights", "1", "--stats",
          "a.stats.safetensors"], ["leave out --weights"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_way_out(
    files, tmp_path, arguments, words, monkeypatch
):
    monkeypatch.chdir(files)
    if arguments[0] == "merge":
        arguments = [*arguments, "--output", tmp_path / "x"]
    with pytest.raises(OrthomergeError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "x").exists()


def test_statistics_of_another_model_are_refused(files, tmp_path):
    stats = tmp_path / "s.stats.safetensors"
    ids = torch.arange(5, 17).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    collect_statistics(tiny_bert(), [batch], ["query", "value"], model_sha256="0" * 64).save(stats)
    with pytest.raises(OrthomergeError, match="are not those of"):
        call("diagnose", files / "a", files / "b", "--stats", stats, "--stats", stats)
