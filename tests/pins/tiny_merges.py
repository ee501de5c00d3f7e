"""Three merges of three adapters whose entries are small integers: the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from orthomerge import merge_adapters, read_adapter

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "example/tiny",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["query", "value"],
    "task_type": "FEATURE_EXTRACTION",
}
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weights": [1, 0.5, 0.25]},
    "ties": {"method": "ties", "weights": 0.5, "rank": 4, "density": 0.5},
    "dare_ties": {"method": "dare_ties", "weights": [1, 1, 0.5], "density": 0.5, "seed": 7},
}
# What varies by version, by machine or by the wording of a card.
_VARIES = ("versions", "sha256")
_FILES = ("README.md", "adapter_config.json")


def make_adapter(folder: Path, seed: int) -> str:
    """An adapter of rank 2 on four layers of shape 6 × 8."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for place, module in enumerate(("query", "value")):
            name = f"base_model.model.encoder.layer.{layer}.attention.self.{module}"
            at = 10 * layer + place + seed
            A = (torch.arange(16) * (7 + at) + at) % 9 - 4
            B = (torch.arange(12) * (5 + at) + at) % 7 - 3
            tensors[f"{name}.lora_A.weight"] = A.reshape(2, 8).float()
            tensors[f"{name}.lora_B.weight"] = B.reshape(6, 2).float()
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder.name


def merged(folder: Path, name: str) -> tuple[str, list[float]]:
    """The text of `merge.json` but for what varies, and the first row of every layer's update.

    `folder` is the working directory, so that the paths in the record are relative.
    """
    adapters = [n if Path(n).is_dir() else make_adapter(folder / n, i) for i, n in enumerate("abc")]
    merge_adapters(adapters, output=folder / name, **MERGES[name])
    record = json.loads((folder / name / "merge.json").read_text(encoding="utf-8"))
    record |= dict.fromkeys(_VARIES, "varies")
    record["files"] |= dict.fromkeys(_FILES, "varies")
    if name != "linear":  # others go through a singular value decomposition
        record["files"]["adapter_model.safetensors"] = "varies"
    record["truncation_error"] = {k: round(v, 5) for k, v in record["truncation_error"].items()}
    rows = [f.delta()[0].tolist() for f in read_adapter(folder / name).layers.values()]
    return json.dumps(record, indent=2) + "\n", [round(v, 4) + 0.0 for row in rows for v in row]
