"""Files of strangers: a tiny adapter by hand, and safetensors with any header one likes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS = ("encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value")
PREFIX = "base_model.model."


def config(**changes: Any) -> dict[str, Any]:
    """A plain LoRA adapter's configuration of rank 2, with changes."""
    return {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"],
        "base_model_name_or_path": "tiny", "task_type": None, **changes,
    }  # fmt: skip


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Factors of rank 2 on two layers of 6 by 4."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for layer in LAYERS:
        found[f"{PREFIX}{layer}.lora_A.weight"] = torch.randn(2, 4, generator=g)
        found[f"{PREFIX}{layer}.lora_B.weight"] = torch.randn(6, 2, generator=g)
    return found


def write_adapter(
    folder: Path, *, seed: int = 0, values: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Path:
    """An adapter folder; `changes` are keys of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values or tensors(seed), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)))
    return folder


def with_header(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file of this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
