"""Tiny models of real architectures, adapters of them by PEFT, and what PEFT makes of those."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from orthomerge.cli import app
from orthomerge.errors import OrthomergeError

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(12).reshape(2, 6) + 5
WORDS = 40

Make = Callable[[], PreTrainedModel]


def llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers, 16 wide, 40 words; the same weights at every call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def saved(folder: Path, make: Make, seed: int, *, base: str | Path = "", **config: Any) -> Path:
    """An adapter that PEFT made and saved, its values drawn under `seed`, nothing at its start."""
    model = drawn(make(), seed, **config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def drawn(model: PreTrainedModel, seed: int, **config: Any) -> PeftModel:
    """A model in PEFT's LoRA, every value that training would change drawn under `seed`."""
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
            elif "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    return wrapped.eval()


def rewritten(folder: Path, rename: Callable[[str], str | None], **config: Any) -> Path:
    """The adapter with other keys (None leaves one out) and with `config` changed."""
    file = folder / WEIGHTS
    tensors = {rename(key): tensor for key, tensor in load_file(file).items()}
    save_file({k: v for k, v in tensors.items() if k is not None}, file)
    return configured(folder, **config)


def configured(folder: Path, **config: Any) -> Path:
    """The adapter with keys of its configuration changed."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def by_peft(folder: Path, model: PreTrainedModel) -> PeftModel:
    """The adapter on a model by PEFT; a key that PEFT misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(model, folder).eval()
        again = wrapped.load_adapter(str(folder), "again")
    assert not again.unexpected_keys
    assert not [key for key in again.missing_keys if "again" in key]
    wrapped.set_adapter("default")
    return wrapped


def merged_in(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the adapter merged into it by PEFT."""
    return by_peft(folder, model).merge_and_unload().eval()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    """What a model answers to two rows of tokens, in float64."""
    with torch.inference_mode():
        found = model(**(inputs or {"input_ids": IDS}))
    return (found.logits if "logits" in found else found.last_hidden_state).double()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for rounding in float32."""
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def refusal(*arguments: object) -> str:
    """The one sentence with which a command refuses; any other end fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    problem = result.exception
    assert isinstance(problem, OrthomergeError), result.output
    said = str(problem)
    assert "\n" not in said
    assert said.endswith(".")
    return said
