"""Converted folders: PEFT loads them and gives what was measured; mistakes leave nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_texts, tiny_bert, write_task
from peft_oracle import bert, loaded, outputs, save_adapter, weights
from typer.testing import CliRunner

from orthomerge import convert_adapters
from orthomerge.adapters import RECORD, ConvertConfig, read_adapter, read_excluded
from orthomerge.cli import app
from orthomerge.errors import AdapterError
from orthomerge.io.rows import read_rows
from orthomerge.statistics import batches, collect_statistics

TARGETS = ["query", "value"]
CONFIG = {"target_modules": TARGETS, "task_type": "SEQ_CLS"}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 5}},
    "bias": {"lora_bias": True},
}


def collect(tokenizer, seed: int, **model):
    return collect_statistics(
        tiny_bert(**model),
        batches([(t, None) for t in make_texts(12, 10 + seed)], tokenizer),
        TARGETS,
        granularity="token",
    )


@pytest.fixture(scope="module")
def stats(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats")
    return [collect(tiny_tokenizer, s).save(folder / f"{s}.safetensors") for s in range(3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subspace", ["quiet", "project", "start"])
def test_peft_loads_the_folder_and_gives_the_converted_update(kind, subspace, stats, tmp_path):
    folder = save_adapter(tmp_path / "a", bert, 1, **CONFIG, **KINDS[kind])
    (found,) = convert_adapters(
        [folder], tmp_path / "out", statistics=stats[:1], others=stats[1:],
        config=ConvertConfig(subspace=subspace),
    )  # fmt: skip
    before, after = read_adapter(folder), read_adapter(found.path)
    assert after.config == before.config
    assert all(torch.equal(after.modules[k], before.modules[k]) for k in before.modules)
    assert all(torch.equal(after.biases[k], before.biases[k]) for k in before.biases)
    plain, merged = bert().state_dict(), weights(found.path, bert)
    for name, factors in after.layers.items():
        delta = merged[f"{name}.weight"] - plain[f"{name}.weight"].double()
        torch.testing.assert_close(delta, factors.delta().double(), rtol=1e-4, atol=1e-6)
        whole = before.layers[name].delta().double()
        share = float((factors.delta().double() - whole).norm() / whole.norm())
        assert found.layers[name].share_of_weights == pytest.approx(share, rel=1e-4)
    assert not torch.equal(outputs(loaded(found.path, bert)), outputs(loaded(folder, bert)))
    record = json.loads((found.path / RECORD).read_text())
    assert record["adapter"]["sha256"] == before.sha256 and len(record["layers"]) == 4
    if subspace == "project":
        rows = read_excluded(found.path).rows
        for name, factors in after.layers.items():
            kept = rows[name.removeprefix("bert.")]
            assert float((factors.A.double() @ kept.T).abs().max()) < 1e-5


def test_with_several_adapters_the_others_are_the_rest(stats, tmp_path):
    folders = [save_adapter(tmp_path / n, bert, i, **CONFIG) for i, n in enumerate("ab")]
    both = convert_adapters(folders, tmp_path / "both", statistics=stats[:2])
    alone = convert_adapters(folders[:1], tmp_path / "one", statistics=stats[:1], others=stats[1:2])
    assert [i.path.name for i in both] == ["a", "b"] and alone[0].path == tmp_path / "one"
    one, two = (i.path / "adapter_model.safetensors" for i in (both[0], alone[0]))
    assert one.read_bytes() == two.read_bytes()
    assert both[0].total.heard_after < both[0].total.heard_before


@pytest.fixture
def given(stats, tmp_path, tiny_tokenizer):
    other = collect(tiny_tokenizer, 1, layers=1)
    return {
        "a": save_adapter(tmp_path / "a", bert, 0, **CONFIG),
        "dora": save_adapter(tmp_path / "dora", bert, 0, use_dora=True, **CONFIG),
        "own": stats[0],
        "other": stats[1],
        "foreign": other.save(tmp_path / "foreign.safetensors"),
    }


MISTAKES = [
    ("{a} --own {own}", "no other tasks"),
    ("{a} --others {other}", "own statistics are needed"),
    ("{a} {a} --stats {own}", "1 own statistics for 2 adapters"),
    ("{a} --own {own} --others {other} --subspace projct", "did you mean 'project'"),
    ("{a} --own {own} --others {other} --refit output", "did you mean 'outputs'"),
    ("{a} --own {own} --others {other} --refit weights", "'low_energy' weighs outputs"),
    ("{a} --own {own} --others {other} --balance -1", "balance -1"),
    ("{a} --own {own} --others {foreign}", "differ in their model configuration"),
    ("{a} --own {own} --others {other} --recover 3", "go together"),
    (
        "{a} --own {own} --others {other} --subspace project --subspace-dim 2",
        "rank 4, more than the subspace_dim",
    ),
    ("{a} --own {own} --others {other} --subspace start --solver minegen", "did you mean"),
    ("{dora} --own {own} --others {other}", "DoRA"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, said, given, tmp_path):
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    words = [*arguments.format(**given).split(), "--output", str(tmp_path / "out")]
    words += ["--base", str(tmp_path / "base")] if "dora" in arguments else []
    result = CliRunner().invoke(app, ["convert", *words])
    assert said in str(result.exception)
    assert not list(tmp_path.glob("*out*"))


def test_the_command_converts_and_recovers(tiny_base, tiny_tokenizer, tmp_path):
    from conftest import call

    texts = [tmp_path / f"{n}.jsonl" for n in "ab"]
    files = [write_task(path, 60, seed) for seed, path in enumerate(texts)]
    stats = [f"{path}.stats.safetensors" for path in files]
    for path, target in zip(files, stats, strict=True):
        call("stats", tiny_base, "--data", path, "--targets", "query,value", "--output", target)
    call("init", tiny_base, "--others", stats[1], "--own", stats[0], "--output", tmp_path / "s")
    call("train", tmp_path / "s", "--task", files[0], "--rows", 30, "--output", tmp_path / "t")
    common = ["--own", stats[0], "--others", stats[1]]
    told = call("convert", tmp_path / "t", *common, "--layers", "-o", tmp_path / "c")
    assert "what the conversion changed" in told and " all " in told
    for subspace in ("quiet", "project"):
        out = tmp_path / subspace
        found = json.loads(
            call("convert", tmp_path / "t", *common, "--subspace", subspace, "--recover", 3,
                 "--task", files[0], "--rows", 30, "-o", out, "--json")
        )  # fmt: skip
        assert found[0]["path"] == str(out) and (out / RECORD).is_file()
        assert json.loads((out / "training.json").read_text())["task"]
    plain, after = (read_adapter(tmp_path / n).layers for n in ("c", "quiet"))
    for name in plain:  # A was held, B trained on
        assert torch.equal(plain[name].A, after[name].A)
        assert not torch.equal(plain[name].B, after[name].B)
    with pytest.raises(AdapterError, match="not empty"):
        call("convert", tmp_path / "t", *common, "-o", tmp_path / "c")


def test_an_arm_of_a_recipe_converts_another_ones_adapters(tiny_base, tmp_path):
    from orthomerge.experiment import Run, parse_recipe

    files = [str(write_task(tmp_path / f"{n}.jsonl", 120, i)) for i, n in enumerate("ab")]
    plain = {
        "name": "t", "base": str(tiny_base), "tasks": files, "statistics": {"samples": 8},
        "data": {"train": 40, "selection": 20, "test": 25}, "training": {"epochs": 1},
        "merges": [{"method": "linear"}], "arms": {"default": {"start": "default"}},
    }  # fmt: skip
    more = {
        "quiet": {"convert": {"from": "default"}},
        "more": {"convert": {"from": "default", "subspace": "project", "recover": 2}},
    }
    before = Run(parse_recipe(plain), tmp_path / "run").execute()
    rows = Run(
        parse_recipe({**plain, "arms": {**plain["arms"], **more}}), tmp_path / "run"
    ).execute()
    assert len(before) == 4 and len(rows) == 12
    assert {r.key for r in before} == {r.key for r in rows if r.arm == "default"}
    assert len({r.key for r in read_rows(tmp_path / "run" / "results.jsonl")}) == 12
    bad = {**plain, "arms": {**plain["arms"], "x": {"convert": {"from": "defalt"}}}}
    with pytest.raises(Exception, match="did you mean 'default'"):
        parse_recipe(bad)
