"""Tiny models and random adapters of every kind, and what PEFT itself makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from conftest import tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def bert():
    return tiny_bert()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def save_adapter(folder: Path, base, seed: int, *, base_name: str = "", **config) -> Path:
    """A random adapter, nothing in it at its start."""
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(), LoraConfig(**options))
        torch.manual_seed(seed)  # the base has a seed of its own
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter *= 0.5 + torch.rand_like(parameter)
                elif "lora_" in name:
                    parameter.normal_(0, 0.3)
                elif "modules_to_save" in name:
                    parameter.normal_()
        model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(folder)
    return folder


def loaded(folder: Path, base) -> PeftModel:
    """The adapter on its base by PEFT; keys that PEFT misses or does not know are an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base(), folder).eval()
        again = model.load_adapter(folder, "again")
    assert not again.unexpected_keys
    assert not [k for k in again.missing_keys if "again" in k]
    model.set_adapter("default")
    return model


def weights(folder: Path, base) -> dict[str, torch.Tensor]:
    """The base's weights with the adapter merged into them by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base(), folder)
        return {k: v.double() for k, v in model.merge_and_unload().state_dict().items()}


def summed(folders: list[Path], factors: list[float], base) -> dict[str, torch.Tensor]:
    """`W + Σ w_i (W_i - W)` of every weight and bias."""
    plain = {k: v.double() for k, v in base().state_dict().items()}
    total = dict(plain)
    for folder, factor in zip(folders, factors, strict=True):
        for name, value in weights(folder, base).items():
            total[name] = total[name] + factor * (value - plain[name])
    return total


def outputs(model) -> torch.Tensor:
    """The logits of two short rows of tokens."""
    tokens = torch.arange(12).reshape(2, 6) + 5
    with torch.inference_mode():
        return model(input_ids=tokens).logits.double()
