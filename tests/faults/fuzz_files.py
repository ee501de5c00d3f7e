"""What the fuzzer does to statistics, Fisher files, directions of a start, and recipes."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzz_mutate import mutated, scratched, with_header

from orthomerge import Statistics
from orthomerge.adapters import read_excluded
from orthomerge.adapters.constrain import EXCLUDED, Directions, write_excluded
from orthomerge.experiment import load_recipe, packaged_recipes
from orthomerge.fisher import ENTRY, FisherMeta, load_fisher, save_fisher
from orthomerge.io.files import fingerprint
from orthomerge.moments import SecondMoment, SketchMoment
from orthomerge.statistics.meta import StatisticsMeta


def _sealed(header: Any, entry: str, rng: random.Random) -> Any:
    """The header changed: mostly its metadata, with the hash made anew, as a stranger can."""
    content = json.loads(header["__metadata__"][entry])
    content.pop("sha256")
    if rng.random() < 0.7:
        content = mutated(content, rng)
    else:
        header = mutated(header, rng)
    if isinstance(header, dict) and isinstance(content, dict):
        with contextlib.suppress(UnicodeEncodeError):
            content = {"sha256": fingerprint(content), **content}
        header["__metadata__"] = {entry: json.dumps(content)}
    return header


def statistics(root: Path) -> Callable[[random.Random], None]:
    """A statistics file, every moment of it read."""
    root.mkdir()
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 6, generator=g)
    moments = {"a": SecondMoment(6).update(rows), "b": SketchMoment(6, 4).update(rows)}
    meta = StatisticsMeta("tiny", "c" * 64, ["a", "b"], "token", 20)
    path = Statistics(moments, {"a": "a", "b": "b", "c": "a"}, meta).save(root / "s.safetensors")
    honest = path.read_bytes()

    def once(rng: random.Random) -> None:
        path.write_bytes(with_header(honest, rng, lambda h: _sealed(h, "orthomerge", rng)))
        found = Statistics.load(path)
        for layer in found.layers:
            found.second_moment(layer)

    return once


def recipe(root: Path) -> Callable[[random.Random], None]:
    """A recipe, validated."""
    root.mkdir()
    honest = yaml.safe_load(packaged_recipes()["demo.yaml"].read_text(encoding="utf-8"))

    def once(rng: random.Random) -> None:
        data = yaml.safe_dump(mutated(honest, rng), allow_unicode=True).encode()
        data = scratched(data, rng) if rng.random() < 0.3 else data
        (root / "r.yaml").write_bytes(data)
        load_recipe(root / "r.yaml")

    return once


def fisher(root: Path) -> Callable[[random.Random], None]:
    """A Fisher file, its hash made anew too, read layer by layer."""
    root.mkdir()
    g = torch.Generator().manual_seed(0)
    layers = {name: torch.rand(6, 4, generator=g) for name in ("a.query", "b.value")}
    path = save_fisher(root / "f.safetensors", layers, FisherMeta("tiny", "a" * 64, "x", 20))
    honest = path.read_bytes()

    def once(rng: random.Random) -> None:
        path.write_bytes(with_header(honest, rng, lambda h: _sealed(h, ENTRY, rng)))
        found = load_fisher(path, adapter_sha256=rng.choice([None, "a" * 64, "b" * 64]))
        for layer in found:
            assert layer in found and isinstance(found[layer], torch.Tensor)

    return once


def kept_out(root: Path) -> Callable[[random.Random], None]:
    """The directions that a start keeps out of."""
    root.mkdir()
    rows = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))[0].T
    write_excluded(root, Directions({"a": rows, "b": rows, "c": rows[:1].clone()}, within=True))
    honest = (root / EXCLUDED).read_bytes()

    def change(header: Any, rng: random.Random) -> Any:
        if rng.random() < 0.5:
            return mutated(header, rng)
        held = header["__metadata__"]
        (entry,) = held
        held[entry] = json.dumps(mutated(json.loads(held[entry]), rng))
        return header

    def once(rng: random.Random) -> None:
        (root / EXCLUDED).write_bytes(with_header(honest, rng, lambda h: change(h, rng)))
        for found in read_excluded(root).rows.values():
            assert isinstance(found, torch.Tensor)

    return once
