"""`orthomerge merge --save-as full`: the whole way from adapters to a model."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call, tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from orthomerge.errors import OrthomergeError

IDS = torch.arange(24).reshape(2, 12) % 30 + 3
WEIGHTS = (0.7, -0.4)


def save(folder, base, seed, **config):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]} | config
    wrapped = get_peft_model(tiny_bert(), LoraConfig(**options, task_type="SEQ_CLS"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(std=0.3)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    tiny_bert().save_pretrained(folder / "base")
    for seed, name in enumerate(("a", "b")):
        save(folder / name, folder / "base", seed)
    save(folder / "biased", folder / "base", 5, lora_bias=True)
    return folder


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def test_a_full_model_gives_what_peft_gives_for_the_merged_adapter(files, tmp_path):
    out = tmp_path / "model"
    said = call(
        "merge", files / "a", files / "b", f"--weights={WEIGHTS[0]},{WEIGHTS[1]}", "--heads",
        "average", "--save-as", "full", "--max-shard-size", "20KB", "-o", out,
    )  # fmt: skip
    assert "the base model with 2 adapters merged, method linear" in said
    assert len(list(out.glob("*.safetensors"))) > 1
    call("merge", files / "a", files / "b", f"--weights={WEIGHTS[0]},{WEIGHTS[1]}", "--heads",
         "average", "-o", tmp_path / "adapter")  # fmt: skip
    base = AutoModelForSequenceClassification.from_pretrained(files / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    record = json.loads((out / "merge.json").read_text())
    assert [a["weight"] for a in record["adapters"]] == list(WEIGHTS)
    assert "AutoModelForSequenceClassification.from_pretrained" in (out / "README.md").read_text()


def test_biases_and_heads_go_with_the_model(files, tmp_path):
    call("merge", files / "a", files / "biased", "--save-as", "full", "-o", tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m" / "heads").iterdir()) == [
        "a.safetensors", "biased.safetensors",
    ]  # fmt: skip
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    base = AutoModelForSequenceClassification.from_pretrained(files / "base")
    layer = "bert.encoder.layer.0.attention.self.query"
    assert not torch.equal(ours.get_submodule(layer).bias, base.get_submodule(layer).bias)
    torch.testing.assert_close(ours.classifier.weight, base.classifier.weight)


def test_a_cut_is_told_and_recorded(files, tmp_path):
    said = call("merge", files / "a", files / "b", "--rank", 1, "--save-as", "full",
                "-o", tmp_path / "m", "--json")  # fmt: skip
    errors = json.loads(said)["truncation_error"]
    assert errors and all(0 < e < 1 for e in errors.values())
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["truncation_error"] == errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save-as", "gguf"], "unknown form 'gguf' in --save-as"),
        (["--save-as", "full", "--method", "emr"], "leaves one update per task"),
        (["--save-as", "full", "--base", "/nowhere/model"], "no model '/nowhere/model'"),
        (["--max-shard-size", "1GB"], "--max-shard-size goes with --save-as full"),
        (["--tune", "entropy", "--task", "sentiment"], "use 'orthomerge tune --objective entropy'"),
        (["--tune", "validation"], "one --task for each adapter"),
        (
            ["--tune", "validation", "--task", "x", "--weights", "1"],
            "--tune finds the weights: leave out --weights",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(files, tmp_path, arguments, words):
    with pytest.raises(OrthomergeError) as caught:
        call("merge", files / "a", files / "b", "-o", tmp_path / "x", *arguments)
    assert words in str(caught.value) and str(caught.value).count(". ") == 0
    assert not list(tmp_path.iterdir())
