"""Small random adapters with heads on the tiny base, as PEFT itself writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model


def make_adapter(
    folder: Path, base: Path, seed: int, *, labels: int = 2, size: float = 0.3
) -> Path:
    """A random adapter of rank 2 on the base's queries and values, with a head of its own."""
    model = tiny_bert(labels)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_A" in name:
                weight.normal_()
            elif "lora_B" in name:
                weight.normal_(std=size)
            elif "classifier.modules_to_save" in name:
                weight.normal_(std=0.5)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    return folder
