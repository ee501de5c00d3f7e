"""What is odd and yet allowed, or nearly: it comes past the checks, into the code behind them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_adapters import CONFIG, NAME, factor, merged, write_adapter
from safetensors.torch import save

from orthomerge.factors import LoraFactors
from orthomerge.merging import MergeMethod, list_methods, merge_layers
from orthomerge.merging.compose import CONSENSUS, SPARSIFIERS
from orthomerge.merging.parts.consensus import SIGN_METHODS
from orthomerge.merging.parts.space import SPACES

_Tensors = dict[str, torch.Tensor]
_START, _OTHER = f"base_model.model.{NAME}", "base_model.model.encoder.layer.1.output.dense"
_TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
_ODD_TYPES = [torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64]


def odd_weights(root: Path) -> Callable[[random.Random], None]:
    """Weights of another type, rank, order or value, or with tensors more or less, merged."""
    adapter = write_adapter(root / "a")

    def once(rng: random.Random) -> None:
        config = dict(CONFIG)
        tensors = _tensors(config, rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            rng.choice(_ODD)(tensors, config, rng)
        data = _saved(tensors, rng)
        (adapter / "adapter_model.safetensors").write_bytes(data)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        method = rng.choice([m for m in list_methods() if not m.needs])
        heads = rng.choice(["keep", "keep", "average", "refuse"])
        rank = rng.choice([None, None, 1, 3, 40])
        merged(root, [adapter] * rng.choice([1, 2, 2]), method=method.name, heads=heads, rank=rank)

    return once


def _tensors(config: dict[str, Any], rng: random.Random) -> _Tensors:
    """One or two layers of any rank, which the configuration says too, and a head."""
    rank, dtype = rng.choice([1, 2, 2, 3, 9]), rng.choice(_TYPES)
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    config |= {"r": rank, "rank_pattern": {}, "use_rslora": rng.random() < 0.2}
    layers = [_START] if rng.random() < 0.5 else [_START, _OTHER]
    found: _Tensors = {}
    for layer in layers:
        found[f"{layer}.lora_A.weight"] = torch.randn(rank, 4, generator=g).to(dtype)
        found[f"{layer}.lora_B.weight"] = torch.randn(6, rank, generator=g).to(dtype)
    if rng.random() < 0.7:
        found["base_model.model.classifier.weight"] = torch.randn(2, 6, generator=g)
    return found


def _another_type(tensors: _Tensors, config: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(list(tensors))
    tensors[key] = tensors[key].to(rng.choice([*_TYPES, *_TYPES, *_ODD_TYPES]))


def _another_value(tensors: _Tensors, config: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(list(tensors))
    tensors[key] = factor(rng, *tensors[key].shape)


def _another_shape(tensors: _Tensors, config: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(list(tensors))
    sizes = [*tensors[key].shape] or [1]
    sizes[rng.randrange(len(sizes))] = rng.choice([0, 1, 2, 5])
    shape = rng.choice([sizes, sizes, sizes[:1], [*sizes, 1], []])
    tensors[key] = torch.ones(shape, dtype=tensors[key].dtype)


def _one_less(tensors: _Tensors, config: dict[str, Any], rng: random.Random) -> None:
    del tensors[rng.choice(list(tensors))]
    tensors.setdefault("base_model.model.score.weight", torch.ones(2, 6))


def _one_more(tensors: _Tensors, config: dict[str, Any], rng: random.Random) -> None:
    key, shape = rng.choice([
        (f"{_START}.lora_B.bias", [6]), (f"{_START}.lora_magnitude_vector", [6]),
        (f"{_START}.base_layer.weight", [6, 4]), (f"{_START}.lora_C.weight", [2, 2]),
        (f"{_START}.bias", [6]), ("base_model.model.classifier.bias", [2]), ("x", [0]),
        ("base_model.model.embed.lora_embedding_A", [config["r"], 7]), ("", [1]),
        ("base_model.model.embed.lora_embedding_B", [4, config["r"]]), ("\u202e/../x", []),
        ("classifier.modules_to_save.default.weight", [2, 6]), ("lora_A.weight", [2, 4]),
    ])  # fmt: skip
    tensors[key] = torch.ones(shape)


def _both_halves(tensors: _Tensors, config: dict[str, Any], rng: random.Random) -> None:
    """A layer more, with a name that a path, a pattern or another layer's name may trip over."""
    name = rng.choice(["../../x", "a/b", "(a+)+$", f"{NAME}.query", "é" * 40, "x" * 300, "0", " "])
    start = f"base_model.model.{name}.lora"
    rank, ends = config["r"], rng.choice([("_A.weight", "_B.weight"), ("_embedding_A",) * 2])
    tensors[start + ends[0]] = torch.ones(rank, 4)
    tensors[start + ends[1].replace("_A", "_B")] = torch.ones(6, rank)


def _settings(tensors: _Tensors, config: dict[str, Any], rng: random.Random) -> None:
    key, values = rng.choice([
        ("lora_alpha", [0, 1, 0.5, -4, 1e30, 1e-30, 16]), ("bias", ["none", "all", "lora_only"]),
        ("rank_pattern", [{"query": 3}, {"dense": 1}, {"^x$": 5}]), ("lora_bias", [True, False]),
        ("alpha_pattern", [{}, {"query": 1}, {"dense": 0}, {".*": 3}]), ("fan_in_fan_out", [True]),
        ("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"]),
        ("modules_to_save", [None, [], ["classifier", "score"]]), ("use_dora", [True]),
        ("target_modules", ["all-linear", [], ".*query", ["query", "dense"]]),
    ])  # fmt: skip
    config[key] = rng.choice(values)


_ODD = [
    _another_type, _another_value, _another_shape, _one_less, _one_more, _both_halves, _settings,
]  # fmt: skip


def _saved(tensors: _Tensors, rng: random.Random) -> bytes:
    """A safetensors file, its keys in any order and its header with what a writer may add."""
    data = save(tensors, rng.choice([None, {"format": "pt"}, {"format": "np", "x": ""}]))
    (size,) = struct.unpack("<Q", data[:8])
    entries = list(json.loads(data[8 : 8 + size]).items())
    rng.shuffle(entries)
    text = json.dumps(dict(entries), ensure_ascii=rng.random() < 0.5).encode()
    text += b" " * rng.choice([-len(text) % 8, 0, 1000])
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


_WORDS = {
    "space": SPACES, "majority_sign_method": SIGN_METHODS, "sparsifier": SPARSIFIERS,
    "consensus": CONSENSUS,
}  # fmt: skip
_EDGES = [0.0, 1e-300, 1e-12, 0.01, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0, 1.5, 2.0, 1e12, -1.0]
_WHOLE = [None, 1, 1, 2, 2, 3, 7, 2**40, 0, -1]


def option_ranges() -> Callable[[random.Random], None]:
    """Options and weights in their ranges and at their ends, by every method that takes any."""
    methods = [m for m in list_methods() if not m.needs and (m.options or m.open_options)]

    def once(rng: random.Random) -> None:
        method, layers = rng.choice(methods), ["layer.0", "layer.1"]
        count = 2 if method.name == "slerp" else rng.choice([1, 2, 3])
        adapters = [_factors(layers, rng) for _ in range(count)]
        weights = [rng.choice([1.0, 1.0, 0.5, 0.0, -1.0, 1e-30, 7.5]) for _ in adapters]
        how: dict[str, Any] = _options(method, rng)
        if rng.random() < 0.2:
            how["layer_weights"] = {rng.choice([r"\.0", ".*", "x"]): rng.choice([0.5, weights])}
        how.setdefault("rank", rng.choice([None, None, None, 1, 40]))
        made = merge_layers(adapters, method=method.name, weights=weights, seed=1, **how)
        for layer in layers:
            dense = made.dense(layer)
            assert dense.shape == (6, 4) and bool(dense.isfinite().all())

    return once


def _factors(layers: list[str], rng: random.Random) -> dict[str, LoraFactors]:
    kept = layers if rng.random() < 0.8 else layers[:1]
    ranks = [rng.choice([1, 2, 2, 5]) for _ in kept]
    g = torch.Generator().manual_seed(rng.getrandbits(30))
    return {
        layer: LoraFactors(torch.randn(r, 4, generator=g), torch.randn(6, r, generator=g), 0.5)
        for layer, r in zip(kept, ranks, strict=True)
    }


def _options(method: MergeMethod, rng: random.Random) -> dict[str, Any]:
    """A value for some of a method's options, and for those of the method inside it."""
    found = {key: _option(key, value, rng) for key, value in method.options.items()
             if rng.random() < 0.7}  # fmt: skip
    if "inner" in method.options:
        inner = rng.choice([m for m in list_methods() if not m.needs])
        found |= {"inner": inner.name, **(_options(inner, rng) if not inner.open_options else {})}
    return found


def _option(key: str, usual: Any, rng: random.Random) -> Any:
    if key in _WORDS:
        return rng.choice(list(_WORDS[key]))
    if isinstance(usual, bool):
        return rng.random() < 0.5
    if usual is None or isinstance(usual, int):
        return rng.choice(_WHOLE)
    return rng.choice([usual, *_EDGES])
