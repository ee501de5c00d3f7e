"""A full fine-tune becomes an adapter; PEFT and the fine-tuned model itself are the oracles."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import call, tiny_bert
from peft import PeftModel
from peft_oracle import gpt2, llama, loaded, outputs, save_adapter, weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaForCausalLM

from orthomerge import verify
from orthomerge.adapters import extract_adapter, merge_adapters, read_adapter
from orthomerge.errors import OrthomergeError, OrthomergeWarning


def bert():
    return tiny_bert(seed=0).eval()


def tied():
    model = llama()
    config = model.config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def saved(model, folder: Path, **how) -> Path:
    model.save_pretrained(folder, **how)
    return folder


@torch.no_grad()
def tuned(model, size: float = 0.05, only: str = ""):
    """Every float parameter moved, those alone that are called so."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter += size * torch.randn_like(parameter)
    return model


KINDS = [
    pytest.param(bert, ["query", "value", "dense"], id="bert"),
    pytest.param(llama, ["q_proj", "down_proj"], id="llama"),
    pytest.param(gpt2, ["c_attn", "c_fc"], id="gpt2"),
]


@pytest.mark.parametrize("base, targets", KINDS)
def test_a_merged_lora_comes_back(tmp_path, base, targets):
    lora = save_adapter(tmp_path / "lora", base, 3, r=3, lora_alpha=5, target_modules=targets)
    merged = PeftModel.from_pretrained(base(), lora).merge_and_unload()
    saved(base(), tmp_path / "base")
    saved(merged, tmp_path / "tuned", max_shard_size="8KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    found = extract_adapter(
        str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", energy=1.0
    )
    assert set(found.ranks) == set(read_adapter(lora).layers)
    assert set(found.ranks.values()) == {3} and found.energy > 0.999999
    before, after = weights(lora, base), weights(tmp_path / "out", base)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-5)
    assert all(c.good for c in verify(tmp_path / "out"))
    low = extract_adapter(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "low", rank=2)
    factors = read_adapter(lora).layers
    for name, error in low.truncation_error.items():
        s = torch.linalg.svdvals(factors[name].delta().double())
        lost = float(s[2:].square().sum() / s.square().sum()) ** 0.5
        assert error == pytest.approx(lost, abs=1e-5)


@pytest.mark.parametrize("base", [bert, llama, gpt2, tied], ids=lambda f: f.__name__)
def test_a_full_fine_tune_answers_as_the_adapter_does_where_all_is_kept(tmp_path, base):
    saved(base(), tmp_path / "base")
    model = tuned(base())
    saved(model, tmp_path / "tuned")
    places = str(tmp_path / "base"), str(tmp_path / "tuned")
    with pytest.raises(OrthomergeError, match="tensors changed that no LoRA layer holds"):
        extract_adapter(*places, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = extract_adapter(*places, tmp_path / "out", energy=1.0, others="save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(base(), tmp_path / "out").eval()
        again = adapted.load_adapter(tmp_path / "out", "again")
    assert not again.unexpected_keys
    assert not [k for k in again.missing_keys if ".again." in k]
    torch.testing.assert_close(outputs(adapted), outputs(model.eval()), rtol=0, atol=2e-4)
    assert found.whole and not found.left_out


def test_a_classifiers_head_is_kept_and_the_body_merges_with_adapters(tmp_path):
    model = tuned(bert(), 0.05, "self.query.weight")
    tuned(model, 0.5, "classifier")
    saved(bert().bert, tmp_path / "base")  # a base without a head, as there are
    saved(model, tmp_path / "tuned")
    base = str(tmp_path / "base")
    extract_adapter(base, str(tmp_path / "tuned"), tmp_path / "out", energy=1.0)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["task_type"], said["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert said["target_modules"] == ["query"]
    start = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(start, tmp_path / "out").eval()
    torch.testing.assert_close(outputs(adapted), outputs(model.eval()), rtol=0, atol=1e-5)
    other = save_adapter(
        tmp_path / "b", bert, 4, base_name=base, target_modules=["query"], task_type="SEQ_CLS"
    )
    merge_adapters([tmp_path / "out", other], output=tmp_path / "merged")
    loaded(tmp_path / "merged", bert)


def test_what_is_left_out_is_said(tmp_path):
    saved(llama(), tmp_path / "base")
    saved(tuned(llama()), tmp_path / "tuned")
    places = str(tmp_path / "base"), str(tmp_path / "tuned")
    with pytest.warns(OrthomergeWarning, match="changed tensors .* are not in the adapter"):
        found = extract_adapter(*places, tmp_path / "out", rank=4, others="leave out")
    assert "model.norm.weight" in found.left_out and not found.whole
    assert json.loads((tmp_path / "out" / "extract.json").read_text())["left_out"] == found.left_out
    assert set(found.ranks.values()) == {4}


def test_added_tokens_go_with_the_adapter(tmp_path):
    saved(llama(), tmp_path / "base")
    model = llama()
    model.resize_token_embeddings(43)
    saved(tuned(model, 0.05, "proj"), tmp_path / "tuned")
    extract_adapter(
        str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", energy=1.0, others="save"
    )
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    start.resize_token_embeddings(43)
    adapted = PeftModel.from_pretrained(start, tmp_path / "out").eval()
    torch.testing.assert_close(outputs(adapted), outputs(model.eval()), rtol=0, atol=1e-4)


def test_rounding_to_another_type_is_no_change(tmp_path):
    saved(llama(), tmp_path / "base")
    model = tuned(llama(), 0.5, "q_proj").bfloat16()
    saved(model, tmp_path / "tuned")
    found = extract_adapter(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out")
    assert {name.rpartition(".")[2] for name in found.ranks} == {"q_proj"}
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_what_is_no_fine_tune_is_refused(tmp_path):
    base = str(saved(llama(), tmp_path / "base"))
    with pytest.raises(OrthomergeError, match="no linear layer changed"):
        extract_adapter(base, str(saved(llama(), tmp_path / "same")), tmp_path / "out")
    wide = llama().config
    wide.intermediate_size = 32
    saved(LlamaForCausalLM(wide), tmp_path / "wide")
    with pytest.raises(OrthomergeError, match="two architectures"):
        extract_adapter(base, str(tmp_path / "wide"), tmp_path / "out")
    with pytest.raises(OrthomergeError, match="the rank 'full' is none"):
        extract_adapter(base, base, tmp_path / "out", rank="full")
    other = saved(tuned(llama(), 5.0, "q_proj"), tmp_path / "far")
    with pytest.warns(OrthomergeWarning, match="make sure that it was trained from that base"):
        extract_adapter(base, str(other), tmp_path / "far-out")


def test_the_command_says_ranks_errors_and_what_is_whole(tmp_path):
    base = saved(llama(), tmp_path / "base")
    saved(tuned(llama(), 0.1, "proj"), tmp_path / "tuned")
    said = call("extract", base, tmp_path / "tuned", "--rank", 4, "--output", tmp_path / "out")
    assert "14 layers, rank 4" in " ".join(said.split())
    words = ["extract", base, tmp_path / "tuned", "--max-error", 0.3, "--json", "--overwrite"]
    found = json.loads(call(*words, "--output", tmp_path / "out"))
    assert max(found["truncation_error"].values()) <= 0.3 and found["energy"] >= 0.91
