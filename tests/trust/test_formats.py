"""Small files that claim much, names that lead elsewhere, code that wants to be run: a sentence."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hostile_files import LAYERS, PREFIX, tensors, with_header, write_adapter

from orthomerge.adapters import load_trainable, merge_adapters, read_adapter
from orthomerge.adapters.checkpoint import read_checkpoint
from orthomerge.adapters.full_model import save_full_model
from orthomerge.errors import AdapterError, AssetError, OrthomergeError
from orthomerge.experiment import load_recipe
from orthomerge.io.documents import Unreadable, parse_json, parse_yaml
from orthomerge.models.loading import (
    load_backbone,
    load_classifier,
    load_meta_model,
    load_tokenizer,
)

HUGE = 10**12
KEY = f"{PREFIX}{LAYERS[0]}.lora_A.weight"


def one_tensor(shape: list[int], begin: int = 0, end: int = 32, **more) -> dict:
    return {KEY: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end], **more}}


HEADERS = {
    "a shape beyond its bytes": with_header(one_tensor([HUGE, HUGE]), bytes(32)),
    "offsets beyond the file": with_header(one_tensor([2, 4], 0, HUGE), bytes(32)),
    "offsets that go back": with_header(one_tensor([2, 4], 32, 0), bytes(32)),
    "a product that overflows": with_header(one_tensor([2**62, 4, 2]), bytes(32)),
    "a negative side": with_header(one_tensor([-2, -4]), bytes(32)),
    "a header of 2^60 bytes": with_header(one_tensor([2, 4]), bytes(32), length=2**60),
    "no type of ours": with_header(one_tensor([2, 4], dtype="PICKLE"), bytes(32)),
    "a list for a header": with_header([1, 2], bytes(32)),
    "deep nesting": with_header(b"[" * 50_000),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_claims_too_much_is_a_sentence(tmp_path, name):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(AdapterError, match="cannot be read as safetensors") as problem:
        merge_adapters([folder], output=tmp_path / "out")
    assert len(str(problem.value)) < 500
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


CONFIGS = [
    {"r": 10**9}, {"r": -1}, {"r": 0}, {"r": True}, {"r": "2"}, {"r": 2.5}, {"r": None},
    {"r": 10**30}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")},
    {"lora_alpha": "4"}, {"lora_alpha": None}, {"rank_pattern": {"query": 10**9}},
    {"rank_pattern": ["query"]}, {"rank_pattern": {"(": 2}}, {"rank_pattern": {"query": -2}},
    {"rank_pattern": {"(a+)+$": 2}}, {"rank_pattern": {"(a|a)*$": 2}},
    {"rank_pattern": {".*.*.*.*.*x": 2}}, {"alpha_pattern": {"x" * 5000: 2}},
    {"alpha_pattern": {"query": float("-inf")}}, {"alpha_pattern": {r"(.)\1": 2}},
    {"modules_to_save": "../../x"}, {"modules_to_save": [1]}, {"target_modules": {"a": 1}},
    {"base_model_name_or_path": ["x"]}, {"task_type": 7}, {"use_rslora": "yes"},
    {"peft_type": ["LORA"]}, {"peft_type": "LOHA"}, {"bias": {}},
]  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda c: json.dumps(c)[:40])
def test_a_configuration_that_does_not_fit_is_a_sentence(tmp_path, changes):
    folder = write_adapter(tmp_path / "a", **changes)
    with pytest.raises(AdapterError) as problem:
        merge_adapters([folder], output=tmp_path / "out")
    assert len(str(problem.value)) < 600
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"r": ' + "9" * 50 + "}", '"\\ud800"', "[1,"],
)
def test_json_that_would_break_a_reader_is_a_sentence(tmp_path, text):
    with pytest.raises(Unreadable):
        parse_json(text)
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match="cannot be read as JSON"):
        read_adapter(folder)


def bomb() -> str:
    """Nine lines that stand for ten to the ninth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(lines)


YAMLS = {
    "aliases of aliases": bomb(),
    "merged aliases": "a: &a {x: 1}\nb: &b {<<: [" + ", ".join(["*a"] * 60_000) + "]}",
    "itself": "a: &a [*a]",
    "deep": "[" * 3000,
    "an object": "a: !!python/object/apply:os.system ['true']",
    "a name": "a: !!python/name:os.system",
    "a long number": "a: " + "9" * 5000,
    "a broken date": "a: 2001-99-99",
    "a tag that does not fit": "a: !!bool maybe",
    "a list for a key": "? [1, 2]\n: 3",
    "control characters": "a: \x00",
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_claims_too_much_is_a_sentence(tmp_path, name):
    with pytest.raises(Unreadable):
        parse_yaml(YAMLS[name])
    (tmp_path / "r.yaml").write_text(YAMLS[name])
    with pytest.raises(OrthomergeError, match="cannot be read as YAML"):
        load_recipe(tmp_path / "r.yaml")


def test_yaml_aliases_of_an_honest_file_are_read():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arms", {"../../x": {"start": "default"}}),
        ("arms", {"/etc/x": {"start": "default"}}),
        ("arms", {".hidden": {"start": "default"}}),
        ("arms", {"a\\..\\b": {"start": "default"}}),
        ("arms", {"x" * 300: {"start": "default"}}),
        ("name", "../x"),
        ("seeds", list(range(50_000))),
        ("training", {"epochs": float("inf")}),
        ("training", {"learning_rate": float("nan")}),
        ("merges", [{"method": "linear", "weights": [float("nan")]}]),
    ],
)
def test_a_recipe_cannot_leave_its_folder_or_ask_for_the_world(tmp_path, key, value):
    from orthomerge.experiment import packaged_recipes

    values = yaml.safe_load(packaged_recipes()["demo.yaml"].read_text(encoding="utf-8"))
    values[key] = value
    if key == "seeds":
        values["merges"] = [{"method": "linear", "weights": [i / 100 for i in range(1, 100)]}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(OrthomergeError):
        load_recipe(tmp_path / "r.yaml")


def test_pickled_weights_are_refused_before_anything_is_loaded(tmp_path, tiny_base):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    for read in (read_adapter, lambda f: load_trainable(object(), f)):
        with pytest.raises(AdapterError, match="save_pretrained to get safetensors"):
            read(folder)


def test_ranks_that_no_matrix_has_take_no_memory_before_training(tmp_path):
    folder = write_adapter(tmp_path / "a", rank_pattern={"other": 10**9})
    with pytest.raises(AdapterError, match="its widest matrix has 6"):
        load_trainable(object(), folder)


def test_a_model_that_brings_code_is_refused_and_its_code_never_run(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "own", "architectures": ["C"],
                "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.C",
                             "AutoModelForSequenceClassification": "own.C"},
            }
        )
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.C", None]}, "tokenizer_class": "C"})
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    for load in (
        load_backbone, load_meta_model, load_tokenizer, lambda p: load_classifier(p, num_labels=2),
    ):  # fmt: skip
        with pytest.raises(AssetError):
            load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "pytorch_model.bin", 7])
def test_an_index_names_safetensors_beside_it_and_nothing_else(tmp_path, shard):
    from orthomerge.models.assets import resolve_model

    (tmp_path / "x.safetensors").write_bytes(b"")
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "model-1.safetensors").write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"a.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError):
        read_checkpoint(folder)
    with pytest.raises(AssetError, match=r"model\.safetensors\.index\.json"):
        resolve_model(str(folder))


def test_a_link_to_a_secret_is_not_copied_into_a_model(tmp_path, tiny_base):
    import shutil

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (tmp_path / "secret.txt").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(OrthomergeError, match="is a link to outside"):
        save_full_model(tmp_path / "out", base, lambda _: None, names=[])
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "secret.txt"]


def test_links_of_the_hubs_cache_are_followed(tmp_path, tiny_base):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in tiny_base.iterdir():
        (cache / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    out = save_full_model(tmp_path / "out", snapshot, lambda _: None, names=[])
    assert (out / "config.json").read_bytes() == (tiny_base / "config.json").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_get_into_a_merge(tmp_path, value):
    values = tensors()
    values[KEY][0, 0] = value
    folder = write_adapter(tmp_path / "a", values=values)
    with pytest.raises(OrthomergeError, match="not finite"):
        merge_adapters([folder], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_small_factors_of_an_enormous_update_are_a_sentence(tmp_path):
    """8 MB that stand for 4 TB: refused where the dense update would be made, in bounded memory."""
    wide = {
        f"{PREFIX}x.lora_A.weight": torch.ones(1, 10**6),
        f"{PREFIX}x.lora_B.weight": torch.ones(10**6, 1),
    }
    for name in "ab":
        write_adapter(tmp_path / name, values=wide, r=1)
    code = (
        "import sys, resource\n"
        "from orthomerge import merge_adapters, OrthomergeError\n"
        "try:\n    merge_adapters(['a', 'b'], method='ties', output='out')\n"
        "except OrthomergeError as e:\n    print(e)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    limit = 16 * 2**30
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    said, peak = done.stdout.splitlines()
    assert "more than this machine has" in said
    assert int(peak) < 2 * 2**20  # KiB
    assert not (tmp_path / "out").exists()
