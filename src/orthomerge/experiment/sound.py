"""Pieces that were damaged after they were written: found before they are used, and made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from orthomerge.adapters import read_adapter, read_kept_out
from orthomerge.errors import AdapterError, OrthomergeError
from orthomerge.experiment.progress import Reporter
from orthomerge.io.documents import read_json
from orthomerge.io.names import TRAINING

_T = TypeVar("_T")


def kept(path: Path, read: Callable[[Path], _T], reporter: Reporter) -> _T | None:
    """What `read` gives of a piece; None where there is none, or one that cannot be read.

    That one stays until the new one is written in its place: a kill meanwhile does not hide it.
    """
    if not path.exists():
        return None
    try:
        return read(path)
    except OrthomergeError:
        reporter.stage(f"{path.name} was damaged: it is made again")
        return None


def read_folder(folder: Path, *, kept_out: bool = False, losses: bool = False) -> Path:
    """Look at all that is read of a start's or an adapter's folder; returns the folder.

    `kept_out` asks for the directions of the constraint "project", `losses` for those of training.

    Raises:
        AdapterError: a part is missing, cut or not what it should be.
    """
    read_adapter(folder)
    if kept_out:
        read_kept_out(folder)
    if losses:
        read_losses(folder)
    return folder


def read_losses(folder: Path) -> list[list[float]]:
    """The pairs of a step and a loss of an adapter's training.

    Raises:
        AdapterError: they cannot be read.
    """
    try:
        found = read_json(folder / TRAINING)["losses"]
        # Floats, as they are when they come back from the run's own file.
        return [[float(step), float(loss)] for step, loss in found]
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise AdapterError(
            f"'{folder / TRAINING}' cannot be read ({problem}): remove '{folder}' and call the "
            "same command again."
        ) from problem
