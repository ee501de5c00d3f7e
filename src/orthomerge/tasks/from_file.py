"""A task from a user's own table: CSV, TSV, JSON, JSON lines or Parquet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orthomerge.errors import TaskError
from orthomerge.io.files import file_sha256, local
from orthomerge.io.tables import read_table
from orthomerge.tasks.corpora import Pools, draw
from orthomerge.tasks.task import Row, Task

TEST_SHARE = 0.3


def from_file(
    path: str | Path,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str = "label",
    name: str | None = None,
    *,
    split: bool = True,
    labels: Sequence[str] | None = None,
) -> Task:
    """The task of a table: words, whole numbers and truth values are classes, fractions a value.

    Whole numbers are classes if there are at most 20 different ones. The classes are in sorted
    order. A column called "pair" is the second text if `pair_column` is not given.

    With `split`, 30 % of the rows are the test pool, by a fixed draw; rows with one text stay on
    one side, and of rows with equal texts (and pairs) the first is kept. Without, the file is read
    whole: it holds training rows, or test rows, and both pools are all of its rows. `labels` are
    the classes that the task is known to have, in their order (none for a value), as a test file
    may lack one of them.

    Raises:
        TaskError: the file cannot be read as its suffix says, lacks a column, has empty cells, or
            a label that is none of `labels`.
    """
    path = local(path)
    table = read_table(path, TaskError)
    if pair_column is None and "pair" in table.columns:
        pair_column = "pair"
    for column in (text_column, label_column, *([pair_column] if pair_column else [])):
        if column not in table.columns:
            raise TaskError(
                f"'{path}' has no column '{column}': it has {', '.join(map(str, table.columns))}."
            )
        empty = int(table[column].isna().sum())
        if empty:
            raise TaskError(f"'{path}' has {empty} empty cells in column '{column}': fill them.")
    texts = [str(t) for t in table[text_column]]
    pairs = [str(t) for t in table[pair_column]] if pair_column else [None] * len(texts)
    raw = table[label_column].tolist()
    values, found = _labels(raw, path, label_column)
    if labels is not None and tuple(labels) != found:
        values, found = _known_labels(raw, labels, path, label_column), tuple(labels)
    rows = [Row(*row) for row in zip(texts, pairs, values, strict=True)]
    about = f"Rows of a file (SHA-256 {file_sha256(path)[:12]}…)"
    return Task(
        name=name or path.stem,
        title=name or path.stem,
        kind="classification" if found else "regression",
        labels=found,
        metric="accuracy" if found else "pearson_spearman",
        source=str(path),
        licence="the user's own",
        made=f"{about}, 30 % of them for the test." if split else f"{about}, all of them.",
        pair=pair_column is not None,
        pools=partial(_split if split else _whole, tuple(rows)),
    )


def _labels(
    raw: list[Any], path: Path, column: str
) -> tuple[list[int] | list[float], tuple[str, ...]]:
    """The labels as class indices with their names, or as floats with no names."""
    if not raw:
        raise TaskError(f"'{path}' has no rows.")
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in raw)
    if numeric:
        if not all(math.isfinite(v) for v in raw):
            raise TaskError(f"column '{column}' of '{path}' has values that are not finite.")
        whole = all(isinstance(v, int) for v in raw)
        if not whole or len(set(raw)) > 20:
            return [float(v) for v in raw], ()
    classes = sorted(set(raw)) if numeric else sorted({str(v) for v in raw})
    index = {value: i for i, value in enumerate(classes)}
    return [index[v if numeric else str(v)] for v in raw], tuple(str(c) for c in classes)


def _known_labels(
    raw: list[Any], labels: Sequence[str], path: Path, column: str
) -> list[int] | list[float]:
    """The labels as indices of the classes that are known, or as the values that they are."""
    if not labels:
        try:
            return [float(v) for v in raw]
        except (TypeError, ValueError):
            raise TaskError(
                f"column '{column}' of '{path}' holds words, and the task asks for a number."
            ) from None
    index = {label: i for i, label in enumerate(labels)}
    for value in raw:
        if str(value) not in index:
            raise TaskError(
                f"column '{column}' of '{path}' holds the label '{value}', which is none of the "
                f"task's: {', '.join(labels)}."
            )
    return [index[str(value)] for value in raw]


def _whole(rows: tuple[Row, ...]) -> Pools:
    return {"train": list(rows), "test": list(rows)}


def _split(rows: tuple[Row, ...]) -> Pools:
    pools: Pools = {"train": [], "test": []}
    seen: set[tuple[str, str | None]] = set()
    for row in rows:
        if (row.text, row.pair) in seen:
            continue
        seen.add((row.text, row.pair))
        test = draw("from_file", row.text).random() < TEST_SHARE
        pools["test" if test else "train"].append(row)
    return pools
