"""Keys that a wrapper, a hand-saved state dict or a second PEFT put names into."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch
from odd_adapters import (
    WEIGHTS,
    by_peft,
    close,
    configured,
    drawn,
    llama,
    logits,
    refusal,
    rewritten,
    saved,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from orthomerge.adapters import convert_adapters, merge_adapters, read_adapter
from orthomerge.adapters.initialise import load_trainable
from orthomerge.errors import AdapterError

TARGETS = ["q_proj", "down_proj", "lm_head"]
WRAPPED = {
    "torch.compile": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda k: f"_orig_mod.{k}",
    "a compiled layer": lambda k: re.sub(r"(layers\.\d+)", r"\1._orig_mod", k),
    "FSDP": lambda k: f"_fsdp_wrapped_module.{k}".replace(
        "self_attn", "_fsdp_wrapped_module.self_attn"
    ),
    "checkpointing": lambda k: k.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    "DDP": lambda k: f"module.{k}",
    "DDP of compiled": lambda k: f"module._orig_mod.{k}",
    "PEFT twice": lambda k: f"base_model.model.{k}",
    "the adapter's name": lambda k: k.replace(".weight", ".default.weight"),
    "another adapter's name": lambda k: k.replace(".weight", ".sft.weight"),
    "all at once": lambda k: f"module.base_model.model._orig_mod.{k}".replace(
        ".weight", ".default.weight"
    ),
}  # fmt: skip


@pytest.fixture
def plain(tmp_path):
    return saved(tmp_path / "plain", llama, 1, target_modules=TARGETS)


def lora_alone(rename):
    """A renaming of LoRA's own keys; PEFT's copy of the embeddings is left out."""
    return lambda key: rename(key) if ".lora_" in key else None


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrappers_names_are_taken_off(tmp_path, wrapper):
    odd = saved(tmp_path / "odd", llama, 1, target_modules=TARGETS)
    expected = logits(by_peft(odd, llama()))
    rewritten(odd, lora_alone(WRAPPED[wrapper]))
    merge_adapters([odd], weights=1.0, output=tmp_path / "out")
    close(logits(by_peft(tmp_path / "out", llama())), expected)


def test_a_state_dict_saved_by_hand_keeps_the_head(tmp_path):
    """`model.state_dict()` holds PEFT's own copies of a whole module beside the trained one."""
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    folder = saved(tmp_path / "a", llama, 1, **config)
    model = drawn(llama(), 1, **config)
    expected = logits(model)
    state = {k: v for k, v in model.state_dict().items() if "lora_" in k or "lm_head" in k}
    assert any("original_module" in key for key in state)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / WEIGHTS)
    merge_adapters([folder], weights=1.0, heads="average", output=tmp_path / "out")
    close(logits(by_peft(tmp_path / "out", llama())), expected)


def test_two_adapters_in_one_file_and_one_tensor_under_two_keys_are_refused(tmp_path):
    folder = saved(tmp_path / "a", llama, 1, target_modules=["q_proj"])
    tensors = load_file(folder / WEIGHTS)
    named = {
        k.replace(".weight", f".{name}.weight"): v.clone()
        for name in ("one", "two")
        for k, v in tensors.items()
    }
    save_file(named, folder / WEIGHTS)
    said = refusal("merge", folder, "-o", tmp_path / "out")
    assert all(word in said for word in (str(folder), "'one', 'two'", "selected_adapters"))
    twice = {**tensors, **{f"module.{k}": v.clone() for k, v in tensors.items()}}
    save_file(twice, folder / WEIGHTS)
    said = refusal("merge", folder, "-o", tmp_path / "out")
    assert all(word in said for word in (str(folder), "twice", "module.base_model", "save"))
    assert not (tmp_path / "out").exists()


def test_a_conversion_writes_plain_keys(tmp_path, plain):
    from orthomerge import collect_statistics

    rewritten(plain, lora_alone(WRAPPED["all at once"]))
    batch = {"input_ids": torch.arange(24).reshape(4, 6) + 3, "attention_mask": torch.ones(4, 6)}
    stats = collect_statistics(llama(), [batch], ["q_proj", "down_proj"])
    adapter = saved(tmp_path / "two", llama, 2, target_modules=["q_proj", "down_proj"])
    rewritten(adapter, WRAPPED["all at once"])
    convert_adapters([adapter], tmp_path / "out", statistics=[stats], others=[stats])
    assert by_peft(tmp_path / "out", llama())


def test_training_from_keys_that_peft_would_not_read_is_refused(tmp_path, plain):
    rewritten(plain, WRAPPED["torch.compile"])
    with pytest.raises(AdapterError, match="PEFT would not read") as problem:
        load_trainable(llama(), plain)
    assert "_orig_mod" in str(problem.value)


VARIANTS = {
    "velora": {"velora_config": {"num_groups": 2, "scale": 1.0, "init_type": "random"}},
    "monteclora": {"monteclora_config": {}},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_differ_in_training_alone_are_read(tmp_path, variant):
    from dataclasses import fields

    from peft import LoraConfig

    (name, value), = VARIANTS[variant].items()  # fmt: skip
    if name not in {field.name for field in fields(LoraConfig)} or variant == "mica":
        known = "mica" in str(LoraConfig.__dataclass_fields__["init_lora_weights"].type)
        if variant != "mica" or not known:
            pytest.skip("this PEFT has no such variant")
    if isinstance(value, dict):
        import peft

        kind = {"velora": "VeloraConfig", "monteclora": "MontecloraConfig"}[variant]
        value = getattr(peft, kind)(**value)
    config = {"target_modules": ["q_proj"], name: value}
    model = drawn(llama(), 1, **config)
    folder = tmp_path / "a"
    model.save_pretrained(folder)
    assert variant == "mica" or any(variant in key for key in get_peft_model_state_dict(model))
    merge_adapters([folder], weights=1.0, output=tmp_path / "out")
    close(logits(by_peft(tmp_path / "out", llama())), logits(model))


@pytest.mark.parametrize("flag", ["kasa_config", "arrow_config", "use_bdlora"])
def test_variants_that_change_more_are_refused(tmp_path, plain, flag):
    configured(plain, **{flag: {"beta": 1.0}})
    said = refusal("merge", plain, "-o", tmp_path / "out")
    assert str(plain) in said
    assert "plain update" in said


def test_a_variant_of_a_newer_peft_is_refused_until_it_is_looked_at(tmp_path, plain, monkeypatch):
    from orthomerge.adapters import kinds

    if "velora_config" not in {field.name for field in fields(LoraConfig)}:
        pytest.skip("this PEFT has no such variant")
    for known in ("_HANDLED_VARIANTS", "_KNOWN"):
        monkeypatch.setattr(kinds, known, getattr(kinds, known) - {"velora_config"})
    configured(plain, velora_config={"num_groups": 2})
    with pytest.raises(AdapterError, match="not known here"):
        read_adapter(plain)
