"""LoRA on the tiny Llama, and what its layers see of three tasks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import make_texts
from peft import LoraConfig, get_peft_model
from tiny_text import save_tiny

import orthomerge
from orthomerge.adapters import lora_layers
from orthomerge.models.loading import load_language_model, load_tokenizer
from orthomerge.statistics import batches

TARGETS = ["q_proj", "v_proj"]
OTHERS = 2
D = 32


def write_rows(path: Path, count: int = 48, seed: int = 0, words: str = "text") -> Path:
    """Lines to fine-tune on, as "text" or as "prompt" and "completion"."""
    texts = make_texts(count, seed)
    rows = (
        [{"text": t} for t in texts]
        if words == "text"
        else [{"prompt": f"{t} ->", "completion": f" {t.split()[0]}"} for t in texts]
    )
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def lay_out(folder: Path) -> tuple[Path, list[str]]:
    """A base folder and the files of two other tasks' statistics.

    The others' inputs fill few directions (one text each, repeated), so that there is room.
    """
    base = save_tiny(folder / "base")
    model, tokenizer = load_language_model(str(base)), load_tokenizer(str(base))
    files = []
    for number in range(OTHERS):
        texts = [(t, None) for t in make_texts(2, 100 + number)]
        found = orthomerge.collect_statistics(
            model, batches(texts, tokenizer), TARGETS, form="text"
        )
        files.append(str(found.save(folder / f"other{number}.stats.safetensors")))
    return base, files


def wrapped(base: Path, rank: int = 4, dtype: torch.dtype = torch.float32):
    """The base in PEFT's LoRA, drawn as PEFT draws it."""
    model = load_language_model(str(base)).to(dtype)
    lora = LoraConfig(r=rank, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def rows_of_A(model) -> dict[str, torch.Tensor]:
    return {
        name: layer.lora_A["default"].weight.detach().clone()
        for name, layer in lora_layers(model).items()
    }


def dominant(files: list[str], share: float = 0.9, rank: int = 4) -> dict[str, torch.Tensor]:
    """The oracle: the top eigenvectors of the summed moments that hold `share` of their trace."""
    read = [orthomerge.Statistics.load(f) for f in files]
    found = {}
    for layer in read[0].layers:
        total = sum(item.second_moment(layer).double() for item in read)
        values, vectors = torch.linalg.eigh(total)
        held = values.flip(0).cumsum(0) / values.sum()
        count = min(int((held < share - 1e-9).sum()) + 1, D - rank)
        found[layer] = vectors.flip(1)[:, :count]
    return found
