"""Tasks: eight that need no model hub, GLUE's eight, and the user's own files."""

from __future__ import annotations

from orthomerge.errors import unknown_name
from orthomerge.io.tables import SUFFIXES
from orthomerge.tasks import glue, offline
from orthomerge.tasks.from_file import from_file
from orthomerge.tasks.part import part_of, split_name
from orthomerge.tasks.prompt import FORMS, Prompt, number_or_mean, prompt_of
from orthomerge.tasks.task import Kind, Row, Task, TaskData, majority

__all__ = [
    "FORMS",
    "Kind",
    "Prompt",
    "Row",
    "Task",
    "TaskData",
    "from_file",
    "get_task",
    "list_tasks",
    "majority",
    "number_or_mean",
    "prompt_of",
]

_TASKS: tuple[Task, ...] = (
    *offline.TASKS,
    *glue.TASKS,
)


def list_tasks() -> list[Task]:
    """Every named task: the ones that need no hub, then GLUE's."""
    return list(_TASKS)


def get_task(name: str) -> Task:
    """The task called `name`, the task of the table at the path `name`, or a part (`name@1/2`).

    Raises:
        UnknownNameError: no task of that name; the message lists the names and the nearest.
        TaskError: a path to a table that cannot be read as a task, or a part that does not exist.
    """
    if part := split_name(name):
        whole, index, of = part
        return part_of(get_task(whole), index, of)
    if name.endswith(SUFFIXES):
        return from_file(name)
    for task in _TASKS:
        if task.name == name:
            return task
    raise unknown_name("task", name, [task.name for task in _TASKS])
