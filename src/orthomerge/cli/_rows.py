"""Which rows a verb trains or scores on: a task's, a part of a table, or a whole table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from orthomerge.errors import RecipeError, TaskError
from orthomerge.io.files import local
from orthomerge.io.tables import SUFFIXES

if TYPE_CHECKING:
    from orthomerge.records import Learnt
    from orthomerge.tasks import Row, Task


TrainFile = Annotated[
    Path | None,
    typer.Option(
        help="Instead of --task: a CSV, JSONL or Parquet file, all rows of which are for training."
    ),
]
TestFile = Annotated[
    Path | None,
    typer.Option(help="A CSV, JSONL or Parquet file, all rows of which are scored."),
]


class Rows(NamedTuple):
    """Rows of a task, and what they are of it, in words; `of` is how many there were."""

    task: Task
    rows: list[Row]
    of: int
    what: str
    fingerprint: str

    @property
    def said(self) -> str:
        """In words: 36 of 36 rows of mine, the whole of mine.csv; labels a, b."""
        labels = self.task.labels
        kind = f"labels {', '.join(labels)}" if labels else "values"
        return f"{len(self.rows)} of {self.of} rows of {self.task.name} ({self.what}; {kind})"


def check_files(*named: str | Path | None) -> None:
    """Refuse tables that are not there, before anything is imported or loaded.

    Raises:
        TaskError: no such file.
    """
    for item in named:
        if item is not None and Path(item).suffix in SUFFIXES and not local(item).exists():
            raise TaskError(f"there is no file '{item}': check the path.")


def training_rows(
    task: str | None, file: Path | None, most: int | None, seed: int
) -> tuple[Rows, dict[str, Any]]:
    """Rows to train on, and what the record says of the table that they are from.

    At most `most`, by default 400 of a task and all of a training file.

    Raises:
        RecipeError: neither a task nor a file, or both.
        UnknownNameError, TaskError: no such task or table.
    """
    from orthomerge.io.files import file_sha256
    from orthomerge.tasks import from_file, get_task

    if (task is None) == (file is None):
        raise RecipeError("name the rows to train on: either --task or --train-file.")
    about = get_task(task) if task else from_file(str(file), split=False)
    table = _table_of(task, file)
    data = about.data(train=most or (None if file else 400), seed=seed, at_most=True)
    of = len(about.pools()["train"])
    if file:
        what = f"the whole of {file.name}"
    elif table:
        kept = len(about.pools()["test"])
        what = f"a fixed split of {table.name}, {kept} rows are kept for 'eval --task'"
    else:
        what = "its training rows"
    origin = {"sha256": file_sha256(table), "whole": file is not None} if table else None
    labels = {"labels": list(about.labels)}
    found = Rows(about, data.train, of, what, data.fingerprint)
    return found, {**labels, **({"table": origin} if origin else {})}


def test_rows(
    task: str | None,
    file: Path | None,
    most: int | None,
    seed: int,
    learnt: Sequence[Learnt],
) -> Rows:
    """Rows to score on: at most `most`, by default 300 of a task and all of a test file.

    A table that is named as a task is scored whole where it is known not to be the one that the
    adapter was trained on, else its test split is.

    Raises:
        RecipeError: neither a task nor a file.
        TaskError: the rows that the adapter was trained on, or a table that does not fit.
        UnknownNameError: no such task.
    """
    from orthomerge.io.files import file_sha256
    from orthomerge.records import learnt_for
    from orthomerge.tasks import from_file, get_task

    table = _table_of(task, file)
    if table is None:
        assert task is not None
        about = get_task(task)
        data = about.data(test=most or 300, seed=seed, at_most=True)
        of = len(about.pools()["test"])
        return Rows(about, data.test, of, "its test rows", data.fingerprint)
    name = task if file and task else table.stem
    known = learnt_for(learnt, name)
    labels = known.labels if known else None
    same = [item for item in learnt if item.table == file_sha256(table)]
    if same and (file is not None or any(item.whole for item in same)):
        way = "name other rows with --test-file"
        way = way if any(item.whole for item in same) else f"'--task {table}' scores its test split"
        raise TaskError(f"the adapter was trained on rows of '{table}': {way}.")
    split = file is None and (bool(same) or not any(item.table for item in learnt))
    about = from_file(str(table), name=name, split=split, labels=labels)
    data = about.data(test=most or (300 if split else None), seed=seed, at_most=True)
    of = len(about.pools()["test"])
    what = f"the test split of {table.name}" if split else f"the whole of {table.name}"
    return Rows(about, data.test, of, what, data.fingerprint)


def _table_of(task: str | None, file: Path | None) -> Path | None:
    """The table that was named, as a file or as a task."""
    if file is not None:
        return file
    return Path(task).expanduser() if task and task.endswith(SUFFIXES) else None
