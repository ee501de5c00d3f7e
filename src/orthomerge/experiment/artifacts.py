"""Reading a start's or an adapter's folder whole, so that damage is found before it is used."""

from __future__ import annotations

from pathlib import Path

from orthomerge.adapters import read_adapter, read_kept_out
from orthomerge.errors import AdapterError
from orthomerge.io.documents import read_json
from orthomerge.io.names import TRAINING


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
