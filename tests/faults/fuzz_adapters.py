"""What the fuzzer does to adapters: configuration, weights, values, options, shards of a base."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_mutate import NASTY, json_bytes, mutated, nothing_but, with_header
from safetensors.torch import save, save_file

from orthomerge import merge_adapters, verify
from orthomerge.adapters.checkpoint import INDEX, read_checkpoint
from orthomerge.cli._app import parse_numbers, parse_options
from orthomerge.errors import OrthomergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import list_methods, merge_layers

NAME = "encoder.layer.0.attention.self.query"
CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"],
    "rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.0.*query": 8}, "use_rslora": False,
    "base_model_name_or_path": "tiny", "task_type": "SEQ_CLS", "modules_to_save": ["classifier"],
    "bias": "none", "use_dora": False, "init_lora_weights": True, "fan_in_fan_out": False,
}  # fmt: skip


def _tensors() -> dict[str, torch.Tensor]:
    g, start = torch.Generator().manual_seed(0), f"base_model.model.{NAME}.lora_"
    return {
        f"{start}A.weight": torch.randn(2, 4, generator=g),
        f"{start}B.weight": torch.randn(6, 2, generator=g),
        "base_model.model.classifier.weight": torch.randn(2, 6, generator=g),
    }


def write_adapter(folder: Path) -> Path:
    """An honest adapter of rank 2 on one layer of 6 by 4, with a head."""
    folder.mkdir(parents=True)
    save_file(_tensors(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def merged(root: Path, adapters: Sequence[Path], **how: Any) -> None:
    """Merge them into a folder, which is there whole or not at all."""
    out, before = root / "out", {p.name for p in root.iterdir()}
    try:
        merge_adapters(adapters, output=out, **how)
    except OrthomergeError:
        nothing_but(root, before)
        raise
    assert all(c.good for c in verify(out))
    shutil.rmtree(out)


def adapter_config(root: Path) -> Callable[[random.Random], None]:
    """A configuration, merged."""
    adapter = write_adapter(root / "a")

    def once(rng: random.Random) -> None:
        (adapter / "adapter_config.json").write_bytes(json_bytes(CONFIG, rng))
        merged(root, [adapter])

    return once


def adapter_weights(root: Path) -> Callable[[random.Random], None]:
    """A header of weights, merged."""
    adapter, honest = write_adapter(root / "a"), save(_tensors())

    def once(rng: random.Random) -> None:
        data = with_header(honest, rng, lambda header: mutated(header, rng))
        (adapter / "adapter_model.safetensors").write_bytes(data)
        merged(root, [adapter])

    return once


def options() -> Callable[[random.Random], None]:
    """Weights and options as the command line takes them."""
    g = torch.Generator().manual_seed(0)
    pair = [
        {NAME: LoraFactors(torch.randn(2, 4, generator=g), torch.randn(6, 2, generator=g))}
        for _ in range(2)
    ]
    methods = [m for m in list_methods() if not m.needs and not m.open_options]

    def once(rng: random.Random) -> None:
        method = rng.choice(methods)
        key = rng.choice([*method.options, "density", "x"])
        value = rng.choice([*map(str, NASTY), *(str(v) for v in method.options.values())])
        options = parse_options([f"{key}={value}"])
        text = ",".join(str(rng.choice([1, 0.5, -1, *NASTY]))[:40] for _ in range(2))
        weights = parse_numbers(text, "weights") if rng.random() < 0.5 else [1.0, 0.5]
        taken = {"method", "weights", "layer_weights", "rank", "seed", "statistics", "fisher"}
        options = {k: v for k, v in options.items() if k not in taken}
        merged = merge_layers(pair, method=method.name, weights=weights, **options)
        assert merged.dense(NAME).shape == (6, 4)

    return once


SIZES = [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e15, 1e19, 3e38, math.inf, math.nan]


def factor(rng: random.Random, *shape: int) -> torch.Tensor:
    """A matrix of some type, mostly whole, now and then with a hard number in it."""
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    found = torch.randn(shape, generator=g) * rng.choice([1.0, *SIZES[:8]])
    if found.numel() and rng.random() < 0.4:
        found.view(-1)[rng.randrange(found.numel())] = rng.choice([*SIZES, *(-s for s in SIZES)])
    return found.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]))


def values() -> Callable[[random.Random], None]:
    """Factors of any shape with hard numbers in them, by every method at once."""
    methods = [m for m in list_methods() if not m.needs]

    def once(rng: random.Random) -> None:
        d_out, d_in = rng.choice([1, 2, 5, 8]), rng.choice([1, 2, 4, 9])
        adapters = []
        for _ in range(2):
            rank = rng.choice([0, 1, 2, 2, 3, 12])
            scaling = rng.choice([1.0, 1.0, 0.5, 0.0, -1.0, 1e30, math.inf, math.nan])
            A, B = factor(rng, rank, d_in), factor(rng, d_out, rank)
            adapters.append({NAME: LoraFactors(A, B.to(A.dtype), scaling)})
        rank = rng.choice([None, None, 1, 2, 40])
        merged = merge_layers(adapters, method=rng.choice(methods).name, rank=rank)
        assert merged.dense(NAME).shape == (d_out, d_in)
        update = merged.layers[NAME]
        for part in (update.A, update.B) if isinstance(update, LoraFactors) else (update,):
            assert bool(part.isfinite().all())

    return once


def shards(root: Path) -> Callable[[random.Random], None]:
    """The index of a base model's shards, or the header of one, read to the last block."""
    root.mkdir()
    tensors = {f"layer.{n}.weight": torch.full((3, 4), float(n)) for n in range(4)}
    by_key = {key: f"model-{n // 2 + 1:05d}-of-00002.safetensors" for n, key in enumerate(tensors)}
    index = {"metadata": {"total_size": 192, "total_parameters": 48}, "weight_map": by_key}
    files = {
        name: save({k: v for k, v in tensors.items() if by_key[k] == name})
        for name in set(by_key.values())
    }

    def once(rng: random.Random) -> None:
        broken = rng.choice([None, None, *sorted(files)])
        for name, honest in files.items():
            (root / name).write_bytes(
                with_header(honest, rng, lambda h: mutated(h, rng)) if name == broken else honest
            )
        text = json.dumps(index).encode() if broken else json_bytes(index, rng)
        (root / INDEX).write_bytes(text)
        for stored in read_checkpoint(root).tensors.values():
            read = sum(len(chunk) for chunk in stored.chunks())
            assert read == stored.end - stored.begin

    return once
