"""What a record says of a merge, a conversion or a start: what went in, from where, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from orthomerge.io.files import fingerprint
from orthomerge.merging import MergeConfig, get_method
from orthomerge.records.inputs import sources_of
from orthomerge.records.learnt import learnt_entries
from orthomerge.records.licences import NOT_STATED, licence_in, licence_of


class Part(Protocol):
    """An adapter that went in, as far as a record describes it (`orthomerge.adapters.Adapter`)."""

    @property
    def name(self) -> str:
        """Its short name."""
        ...

    @property
    def called(self) -> str:
        """What the user called it, or the hub's id and commit."""
        ...

    @property
    def path(self) -> Path | None:
        """Its folder; None in memory."""
        ...

    @property
    def sha256(self) -> str | None:
        """The hash of its weights' file."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Its `adapter_config.json`."""
        ...


def merge_record(
    config: MergeConfig,
    adapters: Sequence[Part],
    names: Sequence[str],
    heads: Sequence[Mapping[str, Any] | None],
    *,
    base_model: str | None,
    base_sha256: str | None,
    statistics: Sequence[Mapping[str, Any]],
    fisher: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What went into a merge, as `merge.json` holds it; errors and hashes come later.

    `heads` has the name of each head's file and how many labels it distinguishes; `base_sha256` is
    the base's hash where it was read or statistics of it were.
    """
    asked = config.to_dict()
    return {
        "method": config.method,
        "paper": get_method(config.method).paper,
        **{key: asked[key] for key in ("options", "seed", "rank", "layer_weights", "heads")},
        **({"energy": config.energy} if config.energy is not None else {}),
        "task_type": adapters[0].config.get("task_type"),
        **about_base(config.base, config.base or base_model, base_sha256),
        "statistics": list(statistics),
        "fisher": list(fisher),
        "adapters": [
            {**about_adapter(name, adapter), "weight": weight, "head": head}
            for name, adapter, weight, head in zip(
                names, adapters, config.spread(len(adapters)), heads, strict=True
            )
        ],
        "versions": versions(),
    }


def start_record(
    config: Any,
    *,
    base: str,
    base_sha256: str,
    others: Sequence[str | Path],
    own: str | Path | None = None,
    existing: Sequence[Part] = (),
    low_energy: float | None = None,
    captured: Mapping[str, Mapping[str, float | None]],
    beside: Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a start was made from, as `start.json` holds it; the hashes of its files come later.

    `config` is an `OsrmConfig`, or None for a start by no solver; `base` and `base_sha256` are the
    base model's name and hash, `others` and `own` statistics files, `captured` is what `captured`
    gives; `beside` is as in `sources_of`, and `more` is written as it is. Rank, alpha and targets
    are in PEFT's own file.
    """
    return {
        **more,
        "config": asdict(config) if config else None,
        "low_energy": low_energy,
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


def about_adapter(name: str, adapter: Part) -> dict[str, Any]:
    """What a record says of an adapter that went in: its name, place, hashes and licence.

    And what it learnt, where its own record says so.
    """
    learnt = learnt_entries(adapter.path) if adapter.path else []
    return {
        "name": name,
        "path": adapter.called,
        "sha256": adapter.sha256,
        "config_sha256": fingerprint(adapter.config),
        "licence": (licence_in(adapter.path) if adapter.path else NOT_STATED)._asdict(),
        **({"learnt": learnt} if learnt else {}),
    }


def versions() -> dict[str, str]:
    """The versions of what made an output."""
    return {p: version(p) for p in ("orthomerge", "peft", "torch", "transformers")}
