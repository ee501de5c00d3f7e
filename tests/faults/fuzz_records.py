"""What the fuzzer does to the records of outputs: of merges, conversions and starts."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_adapters import NAME, write_adapter
from fuzz_mutate import json_bytes, mutated, nothing_but
from safetensors.torch import save_file

from orthomerge import OsrmConfig, Statistics, convert_adapters, merge_adapters, verify
from orthomerge.adapters import ConvertConfig, read_adapter
from orthomerge.errors import OrthomergeError
from orthomerge.io.files import atomic_path
from orthomerge.models.assets import resolve_model
from orthomerge.moments import SecondMoment
from orthomerge.records import (
    CardScore,
    add_scores,
    record_of,
    seal,
    seal_again,
    start_record,
)
from orthomerge.records.file import write_sealed
from orthomerge.statistics.meta import StatisticsMeta

_Once = Callable[[random.Random], None]


def merge_record(root: Path) -> _Once:
    """The record of a merge: verified, now and then done again, and given figures for its card."""
    adapter = write_adapter(root / "a")
    merge_adapters([adapter], output=root / "out")
    return _record(root, "merge.json", adapter)


def convert_record(root: Path) -> _Once:
    """The record of a conversion: verified, now and then done again or taken along."""
    adapter, base = write_adapter(root / "a"), _base(root / "base")
    convert_adapters(
        [adapter], root / "out", statistics=[_statistics(root / "own", base)],
        others=[_statistics(root / "other", base)], config=ConvertConfig(balance=0.5),
        base=str(base),
    )  # fmt: skip
    return _record(root, "convert.json", adapter)


def make_start(root: Path) -> Path:
    """A start's folder with a record that names a base, statistics and an adapter beside it."""
    adapter, base = write_adapter(root / "a"), _base(root / "base")
    start, found = write_adapter(root / "out"), resolve_model(str(base), fetch=False)
    record = start_record(
        OsrmConfig(), base=found.name, base_sha256=found.sha256, existing=[read_adapter(adapter)],
        others=[_statistics(root / "other", base)], own=_statistics(root / "own", base),
        captured={NAME: {"other": 0.1, "own": None}},
    )  # fmt: skip
    seal(start, "start.json", record)
    return start


def start_of(root: Path) -> _Once:
    """The record of a start: verified, and refused where a merge's is wanted."""
    make_start(root)
    return _record(root, "start.json", root / "a")


def _record(root: Path, name: str, adapter: Path) -> _Once:
    out = root / "out"
    kept = Path(shutil.copytree(out, root / "kept"))
    honest = json.loads((out / name).read_text())

    def once(rng: random.Random) -> None:
        (out / name).write_bytes(json_bytes(honest, rng))
        if rng.random() < 0.4:
            _sealed(out / name, mutated(honest, rng))
        before = {p.name for p in root.iterdir()}
        try:
            _used(rng, out, name, adapter)
        finally:
            nothing_but(root, before)
            if (kept / "README.md").exists():  # in which figures were written
                shutil.copyfile(kept / "README.md", out / "README.md")
            nothing_but(out, {p.name for p in kept.iterdir()})

    return once


def _used(rng: random.Random, out: Path, name: str, adapter: Path) -> None:
    """What reads a record: one of them."""
    use = rng.random()
    if use < 0.1:
        add_scores(out, [CardScore(task="a", metric="accuracy", value=0.5, n=10)])
    elif use < 0.2:
        with atomic_path(out.with_name("again")) as folder:
            folder.mkdir()
            seal_again(record_of(out, name), folder, name, recovered={"steps": 2})
        shutil.rmtree(out.with_name("again"))
    else:
        found = verify(out, redo=use < 0.4, adapters=rng.choice([[], [adapter]]))
        assert found and all(isinstance(c.name, str) for c in found)
        json.dumps([c._asdict() for c in found]).encode("utf-8")


def _sealed(file: Path, record: Any) -> None:
    """The record with its hash made anew, as a stranger can; what is no record, as it is."""
    if isinstance(record, dict):
        try:
            write_sealed(file, record)
        except (OrthomergeError, UnicodeEncodeError):
            file.write_text("{}")
    else:
        file.write_text(json.dumps(record))


def _base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file({f"{NAME}.weight": torch.ones(6, 4)}, folder / "model.safetensors")
    return folder


def _statistics(stem: Path, base: Path) -> Path:
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(len(stem.name)))
    meta = StatisticsMeta(
        "tiny", "c" * 64, ["query"], "token", 20,
        model_sha256=resolve_model(str(base), fetch=False).sha256,
    )  # fmt: skip
    moments = {NAME: SecondMoment(4).update(rows)}
    return Statistics(moments, {NAME: NAME}, meta).save(stem.with_suffix(".stats.safetensors"))
