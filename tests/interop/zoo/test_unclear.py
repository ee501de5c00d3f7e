"""What is no LoRA folder of PEFT's: one sentence that says what it is, and the way out."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
from odd_adapters import WEIGHTS, by_peft, close, configured, llama, logits, refusal, saved
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from orthomerge.adapters import merge_adapters, merge_to_model


@pytest.fixture
def adapter(tmp_path):
    return saved(tmp_path / "run" / "a", llama, 1, target_modules=["q_proj"])


def refused(tmp_path, named, *words) -> str:
    said = refusal("merge", named, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for word in (str(named), *words):
        assert str(word) in said, said
    return said


def test_a_path_that_does_not_exist(tmp_path, adapter):
    refused(tmp_path, tmp_path / "run" / "b", "no folder of that name")
    refused(tmp_path, tmp_path / "run" / "aa", f"the nearest is '{adapter}'")
    refused(tmp_path, tmp_path / "nowhere" / "x", "no folder of that name")


def test_a_run_folder_whose_checkpoint_has_the_adapter(tmp_path, adapter):
    run = adapter.parent
    for step in (90, 1000, 500):
        shutil.copytree(adapter, run / f"checkpoint-{step}")
    shutil.rmtree(adapter)
    refused(tmp_path, run, f"'{run / 'checkpoint-1000'}' is one", "3 of its folders")


def test_a_folder_of_a_named_adapter(tmp_path):
    model = get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]), "sft")
    model.save_pretrained(tmp_path / "saved")
    refused(tmp_path, tmp_path / "saved", f"'{tmp_path / 'saved' / 'sft'}' is one")


@pytest.mark.parametrize(
    "name", ["global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py", "x/__0_0.distcp",
             "pytorch_model_fsdp_0/.metadata", "__0_0.distcp"],
)  # fmt: skip
@pytest.mark.parametrize("config", [True, False])
def test_shards_of_deepspeed_and_fsdp(tmp_path, adapter, name, config):
    (adapter / WEIGHTS).unlink()
    if not config:
        (adapter / "adapter_config.json").unlink()
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_bytes(b"")
    if name.startswith("x/"):
        refused(tmp_path, adapter, "it has no")
        refused(tmp_path, adapter / "x", "shards of DeepSpeed or FSDP", "merge-weights")
    else:
        refused(tmp_path, adapter, "shards of DeepSpeed or FSDP", "zero_to_fp32.py")


def test_a_folder_of_several_adapters_of_diffusion_models(tmp_path):
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_{}.weight"
    tensors = {key.format("down"): torch.ones(2, 4), key.format("up"): torch.ones(4, 2)}
    (tmp_path / "loras").mkdir()
    for name in ("a", "b"):
        save_file(tensors, tmp_path / "loras" / f"{name}.safetensors")
    refused(tmp_path, tmp_path / "loras", "several", "a.safetensors, b.safetensors")
    merge_adapters([tmp_path / "loras" / "a.safetensors"], output=tmp_path / "out")


def test_files_instead_of_folders(tmp_path, adapter):
    refused(tmp_path, adapter / WEIGHTS, "name its folder")
    for name, words in {
        "model.bin": "pickle", "lora.gguf": "GGUF", "notes.txt": "name a folder",
        "x.safetensors": "name a folder",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path, tmp_path / name, words)


def test_other_folders(tmp_path, adapter):
    llama().save_pretrained(tmp_path / "base")
    refused(tmp_path, tmp_path / "base", "a whole model (model.safetensors)")
    (adapter / WEIGHTS).rename(adapter / "adapters.safetensors")
    configured(adapter, peft_type=None, fine_tune_type="lora")
    refused(tmp_path, adapter, "MLX")
    (adapter / "adapters.safetensors").rename(adapter / "adapter_model-00001-of-00002.safetensors")
    refused(tmp_path, adapter, "in several files")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", "it has no adapter_config.json")


OTHER = {
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "ADALORA": lambda: peft.AdaLoraConfig(
        target_modules=["q_proj"], init_r=2, target_r=2, total_step=9, init_lora_weights=False
    ),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_types_with_the_way_out_that_this_peft_has(tmp_path, kind):
    """Where the sentence says that PEFT can write it as LoRA, it can, and the result is merged."""
    model = get_peft_model(llama(), OTHER[kind]()).eval()
    model.save_pretrained(tmp_path / "a")
    said = refused(tmp_path, tmp_path / "a", f"type {kind}", "only LoRA")
    if "save_as_lora" in said:
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
        peft.save_as_lora(tmp_path / "lora", loaded, rank=16)
        merge_adapters([tmp_path / "lora"], weights=1.0, output=tmp_path / "out")
        close(logits(by_peft(tmp_path / "out", llama())), logits(model))
    elif hasattr(peft, "convert_to_lora"):
        assert kind in ("ADALORA", "OFT", "IA3", "PREFIX_TUNING", "LN_TUNING")


QUANTIZED = {
    "gptq": ({"quant_method": "gptq", "bits": 3}, "qweight", torch.int32),
    "awq": ({"quant_method": "awq", "version": "gemv"}, "qweight", torch.int32),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "weight", torch.uint8),
    "fp8": ({"quant_method": "fp8"}, "weight", torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_base(tmp_path, adapter, kind):
    from safetensors.torch import load_file

    settings, leaf, dtype = QUANTIZED[kind]
    base = tmp_path / "base"
    model = llama()
    model.config.quantization_config = settings
    llama().save_pretrained(base)
    model.config.save_pretrained(base)
    tensors = {
        (k.replace("weight", leaf) if "proj" in k else k): v.to(dtype) if "proj" in k else v
        for k, v in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    configured(adapter, base_model_name_or_path=str(base))
    said = refusal("merge", adapter, "--save-as", "full", "-o", tmp_path / "out")
    assert all(word in said for word in (str(base), "quantized", kind, "--base")), said
    assert not (tmp_path / "out").exists()
    # The adapter's own file is merged all the same.
    merge_adapters([adapter], weights=1.0, output=tmp_path / "merged")
    llama().save_pretrained(tmp_path / "plain")
    merge_to_model([adapter], tmp_path / "whole", weights=1.0, base=str(tmp_path / "plain"))
