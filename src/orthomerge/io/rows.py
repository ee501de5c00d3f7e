"""The result row: one evaluation, one JSON line, enough to redraw every table and figure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from orthomerge.errors import OrthomergeError
from orthomerge.io.documents import parse_json
from orthomerge.io.files import append_lines

_Record = TypeVar("_Record")

SINGLE = "single"
"""The `method` of a row that scores a task's own adapter alone; its `weight` is None."""
DISTILL = "distill"
"""The `method` of a merge that was trained towards its parts' own answers, in rows and records.

`weight` is that of the merge that it began from; None where it was found.
"""


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One score of one task under one adapter, merged or not.

    Fields: `arm` is the recipe's name for a way to start and train (start, granularity, constraint
    and learning rate together); `weight` multiplies every update of a merge; `split` is "test", or
    "selection" for the rows a learning rate is chosen on; `metric`/`value` the task's main score,
    `metrics` all of them; `n` the number of rows scored; `majority` what a constant answer scores
    on the same rows; `key` the hash of everything the score depends on. `scoring` is set where the
    task is answered in words, which makes the row's `form` "text": "likelihood" or "generation".
    """

    task: str
    arm: str
    start: str
    solver: str | None
    granularity: str | None
    constraint: str
    learning_rate: float
    method: str
    weight: float | None
    metric: str
    value: float
    seed: int
    n: int
    split: str
    key: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    majority: float | None = None
    seconds: float | None = None
    form: str = "classifier"
    scoring: str | None = None

    def to_json(self) -> str:
        """The row as one line of JSON; the form of a classifier goes without saying."""
        values = asdict(self)
        if self.form == "classifier":
            del values["form"], values["scoring"]
        return json.dumps(values, ensure_ascii=False)


def read_rows(path: str | Path) -> list[ResultRow]:
    """Every row of a `results.jsonl`, the later of two rows with one key winning.

    A last line cut short by a kill is left out: its evaluation is simply done again.

    Raises:
        OrthomergeError: the file does not exist, or a line that is not the last is not a row.
    """
    path = Path(path)
    if not path.is_file():
        raise OrthomergeError(f"no result rows at '{path}': run a recipe with this output first.")
    return read_records(path, ResultRow, what="a result row")


def read_records(path: Path, kind: type[_Record], *, what: str = "such a line") -> list[_Record]:
    """Every record of a file of JSON lines, the later of two with one `key` winning.

    Fields that `kind` does not have are ignored; a last line cut short is left out.

    Raises:
        OrthomergeError: a line that is not the last is no record.
    """
    known = {f.name for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    typed = _typed(kind)
    records: dict[str, _Record] = {}
    lines = path.read_bytes().split(b"\n")  # a kill may cut a character in two
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line.decode("utf-8"))
            record = typed.validate_python({k: v for k, v in values.items() if k in known})
        except (ValueError, TypeError, AttributeError) as problem:
            if number >= len(lines) - 1:
                break
            raise OrthomergeError(
                f"line {number} of '{path}' is not {what}: remove it and run again."
            ) from problem
        records[values["key"]] = record
    return list(records.values())


@cache
def _typed(kind: type[Any]) -> TypeAdapter[Any]:
    """What holds the values of a record to the types of its fields."""
    return TypeAdapter(kind)


def append_rows(path: str | Path, rows: Iterable[ResultRow]) -> None:
    """Add rows to a `results.jsonl` and have them on disk before returning."""
    append_lines(path, [row.to_json() for row in rows])
