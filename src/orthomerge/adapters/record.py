"""What a merge or a conversion writes down of its parts: names, places, hashes, licences, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orthomerge.adapters.config import OsrmConfig
from orthomerge.adapters.files import Adapter, common_base
from orthomerge.adapters.heads import label_count
from orthomerge.adapters.licences import licence_in, licence_of
from orthomerge.adapters.provenance import sources_of
from orthomerge.adapters.tensors import shapes_of
from orthomerge.io.files import fingerprint, slug
from orthomerge.merging import MergeConfig, get_method


def merge_record(
    config: MergeConfig,
    adapters: Sequence[Adapter],
    names: Sequence[str],
    *,
    base_sha256: str | None,
    statistics: Sequence[Mapping[str, Any]],
    fisher: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What went into a merge, as `merge.json` holds it; errors and hashes come later.

    `base_sha256` is the base's hash where it was read or statistics of it were.
    """
    asked = config.to_dict()
    return {
        "method": config.method,
        "paper": get_method(config.method).paper,
        **{key: asked[key] for key in ("options", "seed", "rank", "layer_weights", "heads")},
        "task_type": adapters[0].config.get("task_type"),
        **about_base(config.base, config.base or common_base(adapters)[0], base_sha256),
        "statistics": list(statistics),
        "fisher": list(fisher),
        "adapters": [
            {**about_adapter(n, a), "weight": w, "head": _head(n, a)}
            for n, a, w in zip(names, adapters, config.spread(len(adapters)), strict=True)
        ],
        "versions": versions(),
    }


def start_record(
    config: OsrmConfig | None,
    *,
    base: str,
    base_sha256: str,
    others: Sequence[str | Path],
    own: str | Path | None = None,
    existing: Sequence[Adapter] = (),
    quiet_energy: float | None = None,
    captured: Mapping[str, Mapping[str, float | None]],
    beside: Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a start was made from, as `start.json` holds it; the hashes of its files come later.

    `base` and `base_sha256` are the base model's name and hash, `others` and `own` statistics
    files, `captured` is what `captured` gives; `beside` is as in `sources_of`, `more` said too.
    Rank, alpha and targets are in PEFT's own file. A start by no solver has no `config`.
    """
    return {
        **more,
        "config": asdict(config) if config else None,
        "quiet_energy": quiet_energy,
        "base_model": base,
        "base_sha256": base_sha256,
        "statistics": {
            "own": sources_of([own] if own else None, beside),
            "others": sources_of(others, beside),
        },
        "adapters": [about_adapter(a.name, a) for a in existing],
        "captured": {name: dict(energies) for name, energies in captured.items()},
        "versions": versions(),
    }


def about_base(base: str | None, base_model: str | None, base_sha256: str | None) -> dict[str, Any]:
    """What a record says of the base model: as the user named it, what it is, hash, licence."""
    return {
        "base": base,
        "base_model": base_model,
        "base_sha256": base_sha256,
        "base_licence": licence_of(base or base_model)._asdict(),
    }


def about_adapter(name: str, adapter: Adapter) -> dict[str, Any]:
    """What a record says of an adapter that went in: its name, place, hashes and licence."""
    folder = adapter.path or Path()
    return {
        "name": name,
        "path": adapter.called,
        "sha256": adapter.sha256,
        "config_sha256": fingerprint(adapter.config),
        "licence": (licence_in(folder) if adapter.path else licence_of(None))._asdict(),
    }


def versions() -> dict[str, str]:
    """The versions of what made an output."""
    return {p: version(p) for p in ("orthomerge", "peft", "torch", "transformers")}


def _head(name: str, adapter: Adapter) -> dict[str, Any] | None:
    """The name of a head's file and how many labels it tells apart, None where there is none."""
    shapes = shapes_of(adapter.modules)
    if not shapes:
        return None
    return {"name": slug(name), "labels": label_count(shapes, adapter.config.get("task_type"))}
