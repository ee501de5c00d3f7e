"""Figures for the card of a merge that was scored: what each task scores under it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from orthomerge.adapters.card import model_card
from orthomerge.adapters.provenance import read_record, unsealed, write_sealed
from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, read_json
from orthomerge.io.files import file_sha256, write_text
from orthomerge.io.outputs import MERGE

README = "README.md"


class Figure(BaseModel):
    """What one task scores under a merge: its main measure, and two to hold it against.

    `alone` is what the task's own adapter scores on the same rows, `majority` what a constant
    answer does, `n` the number of rows, `by` who measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    value: StrictFloat | StrictInt
    n: StrictInt = Field(gt=0)
    alone: StrictFloat | StrictInt | None = None
    majority: StrictFloat | StrictInt | None = None
    by: str = "orthomerge eval"


def add_figures(folder: str | Path, figures: Sequence[Figure]) -> list[Figure]:
    """Write figures into a merge's card and record; later ones of a task take the earlier's place.

    Hashes of other files stay as they were recorded, so that a folder that was altered is not made
    good. Returns all figures that the card now holds.

    Raises:
        AdapterError: no merge there, or one whose record was altered.
    """
    folder = Path(folder)
    name, record, whole = read_record(folder)
    if name != MERGE:
        raise AdapterError(f"'{folder}' is no merge ({name}): only a merge's card holds figures.")
    if not whole:
        raise AdapterError(f"'{folder / name}' was altered since it was written: merge again.")
    content = unsealed(record)
    try:
        before: list[Any] = record.get("figures") or []
        known = [Figure.model_validate(entry) for entry in before]
        told = {(f.task, f.metric): f for f in (*known, *figures)}
        content["figures"] = [f.model_dump() for f in told.values()]
        card = model_card(content)
    except (LookupError, TypeError, AttributeError, ValueError) as problem:
        raise AdapterError(
            f"'{folder / name}' is of an older version and says too little for a card: merge again."
        ) from problem
    if content["figures"] == record.get("figures"):
        return list(told.values())
    write_text(folder / README, card)
    content["files"] = {**content["files"], README: file_sha256(folder / README)}
    write_sealed(folder / name, content)
    return list(told.values())


def read_figures(files: Iterable[str | Path]) -> list[Figure]:
    """The figures in what `orthomerge eval --json` printed, a file each.

    Raises:
        AdapterError: a file that holds something else.
    """
    return [_figure(Path(file)) for file in files]


def _figure(file: Path) -> Figure:
    try:
        said = read_json(file)
        return figure_of(said)
    except OSError as problem:
        raise AdapterError(
            f"'{file}' cannot be read ({problem.strerror}): name what 'orthomerge eval --json' "
            "printed."
        ) from problem
    except (Unreadable, LookupError, TypeError, ValidationError) as problem:
        raise AdapterError(
            f"'{file}' is not what 'orthomerge eval --json' prints: evaluate again."
        ) from problem


def figure_of(said: Mapping[str, Any]) -> Figure:
    """The main figure of what `eval` found."""
    metric = said["metric"]
    constant = said["majority"].get(metric)
    return Figure(
        task=said["task"],
        metric=metric,
        value=said["metrics"][metric],
        n=said["n"],
        majority=constant if constant is not None and math.isfinite(constant) else None,
    )
