"""What each task scores under a merge, written into the merge's card and record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, read_json
from orthomerge.io.files import file_sha256, write_text
from orthomerge.io.names import CARD, MERGE
from orthomerge.records.card import model_card
from orthomerge.records.file import read_record, unsealed, write_sealed


class CardScore(BaseModel):
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


def add_scores(folder: str | Path, scores: Sequence[CardScore]) -> list[CardScore]:
    """Write scores into a merge's card and record; a task's later score replaces the earlier one.

    Hashes of other files stay as they were recorded, so that a folder that was altered is not made
    good. Returns all scores that the card now holds.

    Raises:
        AdapterError: no merge there, or one whose record was altered.
    """
    folder = Path(folder)
    name, record, whole = read_record(folder)
    if name != MERGE:
        raise AdapterError(f"'{folder}' is no merge ({name}): only a merge's card holds scores.")
    if not whole:
        raise AdapterError(f"'{folder / name}' was altered since it was written: merge again.")
    content = unsealed(record)
    try:
        before: list[Any] = record.get("figures") or []
        known = [CardScore.model_validate(entry) for entry in before]
        found = {(f.task, f.metric): f for f in (*known, *scores)}
        content["figures"] = [f.model_dump() for f in found.values()]
        card = model_card(content)
    except (LookupError, TypeError, AttributeError, ValueError) as problem:
        raise AdapterError(
            f"'{folder / name}' is of an older version and says too little for a card: merge again."
        ) from problem
    if content["figures"] == record.get("figures"):
        return list(found.values())
    write_text(folder / CARD, card)
    content["files"] = {**content["files"], CARD: file_sha256(folder / CARD)}
    write_sealed(folder / name, content)
    return list(found.values())


def read_scores(files: Iterable[str | Path]) -> list[CardScore]:
    """The scores in what `orthomerge eval --json` printed, a file each.

    Raises:
        AdapterError: a file that holds something else.
    """
    return [_score(Path(file)) for file in files]


def _score(file: Path) -> CardScore:
    try:
        said = read_json(file)
        return score_of(said)
    except OSError as problem:
        raise AdapterError(
            f"'{file}' cannot be read ({problem.strerror}): name what 'orthomerge eval --json' "
            "printed."
        ) from problem
    except (Unreadable, LookupError, TypeError, ValidationError) as problem:
        raise AdapterError(
            f"'{file}' is not what 'orthomerge eval --json' prints: evaluate again."
        ) from problem


def score_of(said: Mapping[str, Any]) -> CardScore:
    """The main score of what `eval` found."""
    metric = said["metric"]
    constant = said["majority"].get(metric)
    return CardScore(
        task=said["task"],
        metric=metric,
        value=said["metrics"][metric],
        n=said["n"],
        majority=constant if constant is not None and math.isfinite(constant) else None,
    )
