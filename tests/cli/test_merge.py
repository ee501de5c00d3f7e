"""`orthomerge merge` as a user types it, and everything a user can get wrong in it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import call, make_texts, tiny_bert
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from orthomerge.adapters import merge_adapters, read_adapter
from orthomerge.cli import main
from orthomerge.fisher import FisherMeta, save_fisher
from orthomerge.merging import MergeMethod, list_methods


def save(folder, seed, *, base="", model=None, **config):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]} | config
    model = model or tiny_bert()
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(**options, init_lora_weights=False))
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder)
    return folder


def _poison(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[-1]
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file)


def _cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_base):
    """Adapters and statistics, good and bad, in one folder."""
    folder = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate(("a", "b")):
        save(folder / name, seed, base=str(tiny_base), task_type="SEQ_CLS")
        (folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": t}) for t in make_texts(8, seed))
        )
        call("stats", tiny_base, "--data", folder / f"{name}.jsonl", "--targets", "query,value",
             "--output", folder / f"{name}.stats.safetensors")  # fmt: skip
    other = folder / "other-base"
    tiny_bert(seed=9).bert.save_pretrained(other)
    for file in tiny_base.glob("*[tv]o[kc]*"):  # tokenizer and vocabulary
        (other / file.name).write_bytes(file.read_bytes())
    call("stats", other, "--data", folder / "a.jsonl", "--targets", "query,value",
         "--output", folder / "other.stats.safetensors")  # fmt: skip
    for name in ("a", "b"):
        adapter = read_adapter(folder / name)
        ones = {n: torch.ones(shape) for n, shape in adapter.shapes.items()}
        save_fisher(
            folder / f"{name}.fisher.safetensors", ones,
            FisherMeta(str(tiny_base), adapter.sha256 or "", name, 8),
        )  # fmt: skip
    save(folder / "elsewhere", 3, base="another/base")
    save(folder / "wide", 4, base=str(tiny_base), model=_wide())
    save(folder / "three", 5, base=str(tiny_base), model=tiny_bert(labels=3), task_type="SEQ_CLS")
    save(folder / "dora", 6, base=str(folder / "gone"), use_dora=True)
    _poison(save(folder / "nan", 7, base=str(tiny_base)))
    _cut(save(folder / "cut", 8, base=str(tiny_base)))
    (folder / "pickled").mkdir()
    (folder / "pickled" / "adapter_config.json").write_bytes(
        (folder / "a" / "adapter_config.json").read_bytes()
    )
    (folder / "pickled" / "adapter_model.bin").write_bytes(b"x")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    return folder


def _wide():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=16,
        )
    )  # fmt: skip


def needing_moments() -> MergeMethod | None:
    """A registered method that needs statistics and whose other options have defaults."""
    return next((m for m in list_methods() if m.needs == ("moments",)), None)


BAD = [
    pytest.param("a elsewhere", ["another/base", "one base model", "--base"], id="another base"),
    pytest.param(
        "a wide", ["layer 'bert.encoder.layer.0.attention.self.query'", "[32, 32]", "[64, 64]"],
        id="other shapes",
    ),
    pytest.param("a nan", ["layer 'bert.", "not finite"], id="NaN"),
    pytest.param("a b -m ties -o density=0", ["density", "(0, 1]", "0"], id="density 0"),
    pytest.param("a b -m ties -o density=1.5", ["density", "(0, 1]", "1.5"], id="density above 1"),
    pytest.param("a b -m ties -o density=x", ["density", "'x'"], id="density a word"),
    pytest.param("a b --weights 1,2,3", ["3 weights for 2 adapters"], id="weights count"),
    pytest.param("a b --weights 1,x", ["weights '1,x'"], id="weights words"),
    pytest.param("a b -m ties -o densty=1", ["'densty'", "did you mean 'density'"], id="option"),
    pytest.param("a b -m ties -o density", ["key=value"], id="option without a value"),
    pytest.param("a b -o rank=3", ["'rank'", "the merge itself"], id="option of the command"),
    pytest.param("a b -m tie", ["did you mean 'ties'"], id="method"),
    pytest.param("a cut", ["cut", "copy it again"], id="truncated file"),
    pytest.param("a pickled", ["pickled", "never read", "save_pretrained"], id="pickled"),
    pytest.param("a missing", ["no adapter", "missing"], id="no adapter"),
    pytest.param("a dora", ["DoRA", "--base"], id="DoRA without a base"),
    pytest.param("a three --heads average", ["classifier", "cannot be averaged"], id="heads"),
    pytest.param("a b --heads refuse", ["classifier", "--heads keep"], id="heads refused"),
    pytest.param("a b --heads drop", ["'drop'", "keep, average, refuse"], id="heads unknown"),
    pytest.param("a b --layer-weights nowhere=1", ["no layer matches 'nowhere'"], id="no layer"),
    pytest.param("a b --layer-weights (=1", ["'('", "regular expression"], id="bad expression"),
    pytest.param("a b --layer-weights query", ["REGEX=NUMBERS"], id="no layer weight"),
    pytest.param("a b --layer-weights query=1,x", ["not numbers"], id="layer weight a word"),
    pytest.param("a b --layer-weights query=1,2,3", ["3 weights", "'query'"], id="layer counts"),
    pytest.param("a b --stats a.stats.safetensors", ["takes no statistics"], id="stats unused"),
    pytest.param("a b --fisher a.fisher.safetensors", ["takes no Fisher"], id="Fisher unused"),
    pytest.param("a b -m fisher", ["needs Fisher information"], id="no Fisher"),
    pytest.param("a b -m fisher --fisher a.fisher.safetensors --fisher a.fisher.safetensors",
                 ["a.fisher.safetensors"], id="Fisher of another adapter"),
]  # fmt: skip


def refused(files, monkeypatch, capsys, arguments) -> str:
    """The one sentence on the error stream; anything but status 2 and no output is a failure."""
    monkeypatch.chdir(files)
    short = {"-m": "--method", "-o": "--option"}
    arguments = [short.get(a, a) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["orthomerge", "merge", *arguments])
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert said.count("\n") == 0
    assert said.endswith(".")
    assert sorted(files.iterdir()) == before
    return said


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    files, monkeypatch, capsys, arguments, words
):
    said = refused(files, monkeypatch, capsys, [*arguments.split(), "--output", "out"])
    for word in words:
        assert word in said


def test_an_output_that_is_not_empty_is_left_as_it_is(files, monkeypatch, capsys):
    said = refused(files, monkeypatch, capsys, ["a", "b", "--output", "full"])
    assert "'full' is not empty" in said
    assert "--overwrite" in said
    assert [p.name for p in (files / "full").iterdir()] == ["mine.txt"]


def test_statistics_of_another_model_are_refused(files, monkeypatch, capsys):
    method = needing_moments()
    if method is None:
        pytest.skip("no method needs moments yet")
    stats = ["--stats", "a.stats.safetensors", "--stats", "other.stats.safetensors"]
    said = refused(files, monkeypatch, capsys,
                   ["a", "b", "--method", method.name, *stats, "--output", "out"])  # fmt: skip
    assert "other.stats.safetensors" in said
    assert "collect it on this model" in said
    said = refused(files, monkeypatch, capsys,
                   ["a", "b", "--method", method.name, "--output", "out"])  # fmt: skip
    assert "needs statistics" in said


def test_statistics_are_found_under_the_adapters_names(files, tmp_path):
    method = needing_moments()
    if method is None:
        pytest.skip("no method needs moments yet")
    call("merge", files / "a", files / "b", "--method", method.name, "--stats",
         files / "a.stats.safetensors", "--stats", files / "b.stats.safetensors", "--rank", 4,
         "--output", tmp_path / "out")  # fmt: skip
    assert len(read_adapter(tmp_path / "out").layers) == 4


def test_equal_fisher_information_gives_the_mean(files, tmp_path):
    given = [x for n in "ab" for x in ("--fisher", files / f"{n}.fisher.safetensors")]
    call("merge", files / "a", files / "b", "--method", "fisher", *given, "--output",
         tmp_path / "out")  # fmt: skip
    a, b, out = (read_adapter(p).layers for p in (files / "a", files / "b", tmp_path / "out"))
    for name, merged in out.items():
        expected = (a[name].delta() + b[name].delta()) / 2
        torch.testing.assert_close(merged.delta(), expected, atol=1e-4, rtol=1e-3)


def test_weights_may_be_negative_and_differ_by_layer(files, tmp_path):
    call("merge", files / "a", files / "b", "--weights=-1,1", "--layer-weights", "value=0.5",
         "--layer-weights", r"layer\.(?=1)=2,-0.25", "--output", tmp_path / "out")  # fmt: skip
    a, b, out = (read_adapter(p).layers for p in (files / "a", files / "b", tmp_path / "out"))
    for name, merged in out.items():
        first, second = (
            (0.5, 0.5) if "value" in name else (2, -0.25) if "layer.1" in name else (-1, 1)
        )
        expected = first * a[name].delta() + second * b[name].delta()
        torch.testing.assert_close(merged.delta(), expected, atol=1e-5, rtol=1e-4)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["layer_weights"] == {"value": 0.5, r"layer\.(?=1)": [2, -0.25]}


def test_overwrite_workers_devices_and_typed_options(files, tmp_path):
    target = tmp_path / "out"
    common = [files / "a", files / "b", "--method", "ties", "--output", target, "--json"]
    call("merge", *common, "--option", "density=5e-1")
    one = {n: f.delta() for n, f in read_adapter(target).layers.items()}
    said = json.loads(call("merge", *common, "--option", "density=0.5", "--overwrite",
                           "--workers", 2, "--device", "cpu"))  # fmt: skip
    assert said["layers"] == 4
    for name, factors in read_adapter(target).layers.items():
        torch.testing.assert_close(factors.delta(), one[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["core_space", "pico"])
def test_options_of_an_inner_method_are_given_like_any_other(files, tmp_path, method):
    call("merge", files / "a", files / "b", "--method", method, "--option", "inner=dare_linear",
         "--option", "density=0.5", "--seed", 3, "--output", tmp_path / "out")  # fmt: skip
    expected = merge_adapters(
        [files / "a", files / "b"], method=method, inner="dare_linear", density=0.5, seed=3
    )
    for name, factors in read_adapter(tmp_path / "out").layers.items():
        torch.testing.assert_close(factors.delta(), expected.dense(name), atol=1e-6, rtol=1e-5)


def test_methods_say_what_they_need_and_fit_a_page(monkeypatch):
    found = {m["name"]: m for m in json.loads(call("list", "methods", "--json"))}
    assert found["linear"]["needs"] == []
    assert found["linear"]["per_task"] is False
    assert {m.name: (list(m.needs), m.per_task) for m in list_methods()} == {
        name: (m["needs"], m["per_task"]) for name, m in found.items()
    }
    monkeypatch.setenv("COLUMNS", "100")
    lines = call("list", "methods").splitlines()
    assert max(map(len, lines)) <= 100
    for name in found:
        assert any(line.split()[:1] == [name] for line in lines)
