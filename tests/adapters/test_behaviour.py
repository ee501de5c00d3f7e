"""`verify --data`: a merge that behaves like the base, or unlike its record, is found."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import call, make_texts
from safetensors.torch import load_file, save_file
from small_adapters import make_adapter
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from orthomerge.adapters import as_user, behaviour, merge_adapters, merge_to_model, verify_outputs
from orthomerge.cli import app
from orthomerge.errors import OrthomergeError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """What the fresh process does, done here, which is faster; one test asks for a process."""

    def run(words, **how):
        as_user.main(Path(words[-1]))
        return subprocess.CompletedProcess(words, 0, "", "")

    if "fresh" not in request.node.name:
        monkeypatch.setattr(behaviour.subprocess, "run", run)


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory) -> Path:
    """Two adapters with heads on the tiny base, their merges of each form, and texts."""
    root = tmp_path_factory.mktemp("behaviour")
    pair = [make_adapter(root / name, tiny_base, seed) for seed, name in enumerate("ab")]
    lines = [json.dumps({"text": text}) for text in make_texts(12, 0)]
    (root / "texts.jsonl").write_text("\n".join(lines))
    merge_adapters(pair, method="ties", density=0.5, output=root / "adapter")
    merge_adapters(pair, method="tall_masks", output=root / "tasks")
    merge_adapters(pair, weights=[1, 0.5], heads="average", rank=3, output=root / "average")
    merge_to_model(pair, root / "model", weights=[1, 0.5])
    return root


@pytest.fixture
def copied(world, tmp_path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "copy"))


def seen(root: Path, name: str, **how):
    adapters = [root / "a", root / "b"]
    return verify_outputs(root / name, [root / "texts.jsonl"], adapters=adapters, **how)


def change(folder: Path, by) -> None:
    file = folder / WEIGHTS
    save_file(by(load_file(file)), file)


@pytest.mark.parametrize("form", ["adapter", "tasks", "average", "model"])
def test_a_merge_behaves_as_its_record_says(world, form):
    found = seen(world, form)
    assert found.good, found.said
    for task in found.tasks:
        assert task.difference is not None and task.difference < 1e-3
        assert 0.9 < task.change < 1.1
        assert task.agreement is not None and task.cosine is not None
        assert task.cosine > 0.2 or form == "average"  # under another head


def test_an_output_with_no_keys_that_peft_knows_behaves_like_the_base(copied):
    change(
        copied / "adapter", lambda t: {k.replace("base_model.", "model."): v for k, v in t.items()}
    )
    found = seen(copied, "adapter")
    assert not found.good
    assert "behaves like the base: PEFT finds in it none of the 8 tensors" in found.said


def test_an_empty_adapter_behaves_like_the_base(copied):
    change(copied / "adapter", lambda t: {"odd": torch.zeros(1)})
    assert "behaves like the base" in seen(copied, "adapter").said


def test_a_layer_that_is_lost_is_found(copied):
    change(copied / "adapter", lambda t: dict(list(t.items())[2:]))
    assert "does not find 2 of 8 tensors" in seen(copied, "adapter").said


def test_an_update_of_zero_behaves_like_the_base(copied):
    change(copied / "adapter", lambda t: {k: v * ("_A" in k) for k, v in t.items()})
    found = seen(copied, "adapter")
    assert (
        not found.good and "behaves like the base: for 'a' it changes outputs by 0.0%" in found.said
    )


def test_adapters_that_change_nothing_make_a_merge_that_is_the_base(copied):
    for name in "ab":
        change(copied / name, lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()})
    merge_adapters([copied / "a", copied / "b"], output=copied / "nil")
    assert "because what was merged changes nothing" in seen(copied, "nil").said


def test_a_scale_that_is_wrong_is_named(copied):
    change(
        copied / "adapter", lambda t: {k: v * (0.9 if "lora_B" in k else 1) for k, v in t.items()}
    )
    found = seen(copied, "adapter")
    assert "is not what its record says" in found.said and "as 0.9 times the update" in found.said
    assert seen(copied, "adapter", tolerance=0.5).good


def test_another_adapter_than_the_record_says_is_found(copied):
    shutil.copy(copied / "b" / WEIGHTS, copied / "a" / WEIGHTS)
    assert "is not what its record says" in seen(copied, "adapter").said


def test_a_model_that_is_the_base_is_found(copied, tiny_base):
    base = load_file(next(Path(tiny_base).glob("*.safetensors")))
    own = load_file(copied / "model" / "model.safetensors")
    layers = {k: base.get(k, base.get(k.removeprefix("bert."), v)) for k, v in own.items()}
    save_file(layers, copied / "model" / "model.safetensors", {"format": "pt"})
    assert "the merged output behaves like the base" in seen(copied, "model").said


def test_a_file_that_does_not_load_is_said_and_not_raised(copied):
    (copied / "adapter" / WEIGHTS).write_bytes(b"no safetensors")
    assert "cannot be loaded" in seen(copied, "adapter").said


def test_what_another_program_merged_is_held_against_the_adapters(copied):
    for extra in ("merge.json", "heads"):
        path = copied / "average" / extra
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    found = seen(copied, "average")
    assert found.good and found.tasks[0].difference is None and found.tasks[0].change > 0.3
    change(copied / "average", lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()})
    assert "behaves like the base" in seen(copied, "average").said
    with pytest.raises(OrthomergeError, match="name the adapters with --against"):
        verify_outputs(copied / "average", [copied / "texts.jsonl"])


def test_the_command_says_it_in_a_fresh_process_in_a_sentence_and_by_its_status(copied):
    a, b, data = copied / "a", copied / "b", copied / "texts.jsonl"
    said = call("verify", copied / "adapter", "--against", a, b, "--data", data)
    assert "it is what its record says" in said
    change(copied / "adapter", lambda t: {k: v * 0 for k, v in t.items()})
    words = ["verify", copied / "adapter", "--against", a, b, "--data", data, "--json"]
    result = CliRunner().invoke(app, [str(w) for w in words])
    found = json.loads(result.output)
    assert result.exit_code == 1 and not found["ok"] and not found["behaviour"]["good"]
    with pytest.raises(OrthomergeError, match="on the texts of --data"):
        call("verify", copied / "adapter", "--against", a, b)


@pytest.fixture(scope="module")
def decoder(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_a_decoders_conv1d_and_tied_embeddings_are_compared(decoder, world, tmp_path, form):
    from peft_oracle import save_adapter

    def base():
        return GPT2LMHeadModel.from_pretrained(decoder)

    targets = ["c_attn", "c_fc", "wte"]
    pair = [
        save_adapter(
            tmp_path / name, base, seed, base_name=str(decoder), target_modules=targets,
            use_rslora=bool(seed),
        )
        for seed, name in enumerate("ab")
    ]  # fmt: skip
    if form == "model":
        merge_to_model(pair, tmp_path / "out", weights=0.5)
    else:
        merge_adapters(pair, weights=0.5, output=tmp_path / "out")
    found = verify_outputs(tmp_path / "out", [world / "texts.jsonl"] * 2, samples=5)
    assert found.good, found.said
    assert max(t.difference or 0 for t in found.tasks) < 1e-3
