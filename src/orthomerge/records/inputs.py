"""Where the inputs of an output are: as a record names them, and on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError
from orthomerge.io.files import known_sha256
from orthomerge.models.assets import ResolvedModel, resolve_model


def entries_of(record: Mapping[str, Any]) -> Any:
    """What a record says of the adapters that went in: a merge's, or a conversion's one."""
    return record.get("adapters", [record.get("adapter")])


def place_of(named: Any, output: Path) -> Path | None:
    """Where an input is: as a record calls it, from here or from beside the output."""
    if not isinstance(named, str) or not named or "\0" in named:
        return None
    try:
        places = (Path(named), output.absolute().parent / named)
        return next((p for p in places if p.exists()), None)
    except OSError:  # a name longer than names can be
        return None


def base_here(
    record: Mapping[str, Any], output: Path, named: str | None = None
) -> ResolvedModel | None:
    """The base model, as it is `named` or as a record names it; None where it is not here."""
    said = named or record.get("base") or record.get("base_model")
    if not isinstance(said, str) or not said:
        return None
    try:
        return resolve_model(str(place_of(said, output) or said), fetch=False)
    except (OrthomergeError, OSError):
        return None


def sources_of(
    items: Sequence[Any] | None, beside: Path | None = None
) -> list[dict[str, str | None]]:
    """Where statistics or Fisher information are from, by path and hash; nulls for memory.

    `beside` is the folder that the output is in, for paths from there, so that both may move.
    """
    found: list[dict[str, str | None]] = []
    for item in items or ():
        path = item if isinstance(item, str | Path) else getattr(item, "path", None)
        if path is None:
            found.append({"path": None, "sha256": None})
        else:
            named = str(path) if beside is None else os.path.relpath(path, beside)
            found.append({"path": named, "sha256": known_sha256(Path(path))})
    return found
