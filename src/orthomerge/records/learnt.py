"""What an adapter learnt, and how it is asked: as its own record says, or its merge's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.errors import AdapterError, TaskError
from orthomerge.io.documents import is_array, is_object, object_in
from orthomerge.io.names import CONVERT, MERGE, TRAINING
from orthomerge.records.file import record_of
from orthomerge.records.inputs import entries_of

if TYPE_CHECKING:
    from orthomerge.tasks import Prompt

_KEYS = ("task", "labels", "form", "prompt", "max_length", "table")


@dataclass(frozen=True)
class Learnt:
    """One task that an adapter was trained for.

    `labels` are in the order of the head's outputs, empty for a value and None where the record
    does not say them; `prompt` is how the task is asked in words, None for a classifier. `table` is
    the SHA-256 of the user's file that the rows are from; `whole` says that all of its rows were
    for training.
    """

    task: str | None
    labels: tuple[str, ...] | None
    prompt: Prompt | None
    max_length: int
    table: str | None = None
    whole: bool = False

    @property
    def form(self) -> str:
        """How the task is put: "text" or "classifier"."""
        return "text" if self.prompt else "classifier"


def learnt_by(folder: Path | None) -> list[Learnt]:
    """What the adapter, merge or merged model in `folder` learnt, in the adapters' order.

    Nothing without a folder, or where no record says it: an adapter of another program, or of an
    older version.

    Raises:
        AdapterError: a record that cannot be read.
    """
    return [_read(entry, folder) for entry in learnt_entries(folder)] if folder else []


def learnt_entries(folder: Path) -> list[dict[str, Any]]:
    """The same as JSON, for a merge's record; another program's training.json says nothing."""
    record = object_in(folder / TRAINING)
    if "form" in record and "max_length" in record:
        return [{key: record[key] for key in _KEYS if key in record}]
    for name in (MERGE, CONVERT):
        if (folder / name).is_file():
            entries = entries_of(record_of(folder, name))
            there = entries if is_array(entries) else []
            said = [e["learnt"] for e in there if is_object(e) and is_array(e.get("learnt"))]
            return [item for items in said for item in items if is_object(item)]
    return []


def learnt_for(
    learnt: Sequence[Learnt], task: str, labels: Sequence[str] | None = None
) -> Learnt | None:
    """What says how `task` is asked: the entry of that name, else the only one there is.

    An entry of another name goes only with the same labels.
    """
    named = [item for item in learnt if item.task == task]
    if named:
        return named[0]
    only = learnt[0] if len(learnt) == 1 else None
    return only if only and (labels is None or only.labels == tuple(labels)) else None


def _read(entry: Mapping[str, Any], folder: Path) -> Learnt:
    labels, table, prompt = entry.get("labels"), entry.get("table"), entry.get("prompt")
    try:
        return Learnt(
            task=entry.get("task"),
            labels=tuple(map(str, labels)) if is_array(labels) else None,
            prompt=_prompt(prompt) if is_object(prompt) else None,
            max_length=int(entry["max_length"]),
            table=str(table["sha256"]) if is_object(table) else None,
            whole=bool(is_object(table) and table.get("whole")),
        )
    except (KeyError, TypeError, ValueError, TaskError) as problem:
        raise AdapterError(
            f"the record in '{folder}' does not say how its adapter is asked ({problem}): it was "
            "altered."
        ) from problem


def _prompt(found: dict[str, Any]) -> Prompt:
    from orthomerge.tasks import Prompt  # whose package has all tasks, and most adapters no prompt

    return Prompt.of(found)
