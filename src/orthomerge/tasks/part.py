"""Part of a task as a task of its own: `sentiment@1/2` is half of the rows of `sentiment`.

For comparisons over more tasks than there are: the parts share their kind and their wording, but no
text, so each is another team's data for the same job.
"""

from __future__ import annotations

import re
from dataclasses import replace

from orthomerge.errors import TaskError
from orthomerge.io.files import derive_seed
from orthomerge.tasks.task import Row, Task

_PART = re.compile(r"^(?P<name>[^@]+)@(?P<index>\d+)/(?P<of>\d+)$")


def split_name(name: str) -> tuple[str, int, int] | None:
    """The whole task's name, the number of the part and of how many; None for a whole task."""
    found = _PART.match(name)
    return (found["name"], int(found["index"]), int(found["of"])) if found else None


def part_of(task: Task, index: int, of: int) -> Task:
    """Part `index` of `of` (from 1): the rows whose text falls into it by its hash, in every pool.

    Raises:
        TaskError: no such part.
    """
    if not 1 <= index <= of:
        raise TaskError(f"task '{task.name}' has no part {index} of {of}: parts go from 1 to {of}.")

    def mine(row: Row) -> bool:
        return derive_seed(0, row.text) % of == index - 1

    def pools() -> dict[str, list[Row]]:
        return {split: [r for r in rows if mine(r)] for split, rows in task.pools().items()}

    return replace(
        task,
        name=f"{task.name}@{index}/{of}",
        title=f"{task.title}, part {index} of {of}",
        made=f"{task.made} The rows whose text's hash falls into part {index} of {of}.",
        pools=pools,
    )
