"""What a trained adapter's folder says of its training: the constraint, and its strength."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orthomerge.adapters.config import CONSTRAINTS, FROZEN_B
from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, is_object, read_json
from orthomerge.io.files import write_json
from orthomerge.io.names import TRAINING


class Trained(NamedTuple):
    """How an adapter was trained; `strength` is λ of the constraint "penalty", else None."""

    constraint: str
    strength: float | None

    def describe(self) -> dict[str, Any]:
        """As the file holds it."""
        strength = {} if self.strength is None else {"strength": self.strength}
        return {"constraint": self.constraint, **strength}


def write_training(folder: str | Path, trained: Trained, more: Mapping[str, Any]) -> None:
    """Say it in the folder of an adapter that another trainer saved; `more` is said too.

    It holds no hashes: what is not orthomerge's own work is not to be replaced by it.
    """
    write_json(Path(folder) / TRAINING, {**more, **trained.describe()})


def read_trained(folder: str | Path) -> Trained | None:
    """How the adapter of a folder was trained; None where the folder does not say.

    Raises:
        AdapterError: a file that cannot be read, or that names no constraint there is.
    """
    path = Path(folder) / TRAINING
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except (Unreadable, OSError) as problem:
        raise AdapterError(
            f"'{path}' cannot be read ({problem}): remove it, or train the adapter again."
        ) from problem
    if not is_object(found) or "constraint" not in found:
        return None  # another trainer's file, or one of before constraints were written
    constraint, strength = found["constraint"], found.get("strength")
    whole = strength is None or (type(strength) in (int, float) and 0 <= strength < float("inf"))
    if constraint not in (*CONSTRAINTS, FROZEN_B) or not whole:
        raise AdapterError(
            f"'{path}' says constraint {constraint!r}, strength {strength!r}, which no training "
            "has: remove it, or train the adapter again."
        )
    return Trained(str(constraint), None if strength is None else float(strength))
