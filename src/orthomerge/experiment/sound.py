"""Pieces that were damaged after they were written: found before they are used, and made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from orthomerge.adapters import read_adapter, read_kept_out
from orthomerge.errors import AdapterError, OrthomergeError
from orthomerge.experiment.progress import Reporter

# The losses beside a trained adapter, and where a piece that cannot be read is put.
TRAINING = "training.json"
ASIDE = ".unreadable"

_T = TypeVar("_T")


def kept(path: Path, read: Callable[[Path], _T], reporter: Reporter) -> _T | None:
    """What `read` gives of a piece; None where there is none, or one that cannot be read.

    That one is set aside under a name of its own, so that the piece can be made again.
    """
    if not path.exists():
        return None
    try:
        return read(path)
    except OrthomergeError:
        reporter.stage(f"{path.name} was damaged: set aside, and made again")
    aside = path.with_name(path.name + ASIDE)
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    return None


def read_folder(folder: Path, *, kept_out: bool = False) -> Path:
    """Look at all that is read of a start's or an adapter's folder; returns the folder.

    Raises:
        AdapterError: a part is missing, cut or not what it should be.
    """
    read_adapter(folder)
    if kept_out:
        read_kept_out(folder)
    if (folder / TRAINING).is_file():
        read_losses(folder)
    return folder


def read_losses(folder: Path) -> list[list[float]]:
    """The pairs of a step and a loss of an adapter's training.

    Raises:
        AdapterError: they cannot be read.
    """
    try:
        return json.loads((folder / TRAINING).read_text(encoding="utf-8"))["losses"]
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise AdapterError(
            f"'{folder / TRAINING}' cannot be read ({problem}): remove '{folder}' and call the "
            "same command again."
        ) from problem
