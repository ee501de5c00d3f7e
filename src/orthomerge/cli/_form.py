"""The form of a task on the command line: classes by a head, or answers in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orthomerge.tasks import Prompt, Task

Form = Annotated[
    str,
    typer.Option(help="classifier (a head on top) or text (a language model answers in words)."),
]
TemplateText = Annotated[
    str | None,
    typer.Option(help="text: an instruction with {text}, or a .txt or YAML file of one."),
]


def check_form(form: str, template: str | None) -> None:
    """Refuse what is no form, and a template for a classifier.

    Raises:
        RecipeError: one of the two.
    """
    from orthomerge.errors import RecipeError, unknown_name
    from orthomerge.tasks import FORMS

    if form not in FORMS:
        raise unknown_name("form", form, FORMS, error=RecipeError)
    if form == "classifier" and template is not None:
        raise RecipeError("--template is for tasks in words: add --form text.")


def prompt_for(task: Task, form: str, template: str | None) -> Prompt | None:
    """How the task is asked in words; None for a classifier.

    Raises:
        RecipeError: no such form, or a template without the form "text".
        UnknownNameError, TaskError: a template that does not fit the task.
    """
    from orthomerge.tasks import prompt_of

    check_form(form, template)
    return prompt_of(task, template) if form == "text" else None
