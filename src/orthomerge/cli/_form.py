"""How a task is put to a model on the command line: in which form, words and tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from orthomerge.records import Learnt
    from orthomerge.tasks import Prompt, Task

Form = Annotated[
    str | None,
    typer.Option(
        help="classifier (a head on top) or text (a language model answers in words); default what "
        "the adapter was made for."
    ),
]
TemplateText = Annotated[
    str | None,
    typer.Option(
        help="text: an instruction with {text}, or a .txt or YAML file of one; default the one the "
        "adapter was trained with, else the task's own."
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="text: put the instruction through the model's chat template."),
]
LENGTH = 128
"""The maximal number of tokens of a text or a prompt, where nothing says another."""

_WORDS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


class Asked(NamedTuple):
    """How a task is asked: `prompt` in words, None for a classifier."""

    prompt: Prompt | None
    max_length: int


def form_of(form: str | None, task_type: str | None, *, words: bool = False) -> str:
    """The form that was named, else the one that PEFT's task type is for.

    With `words` something was said that is for words alone (a template, a chat).

    Raises:
        RecipeError: no such form, or words for a classifier.
    """
    from orthomerge.errors import RecipeError, unknown_name
    from orthomerge.tasks.prompt import FORMS

    found = form or ("text" if task_type in _WORDS else "classifier")
    if found not in FORMS:
        raise unknown_name("form", found, FORMS, error=RecipeError)
    if words and found == "classifier":
        raise RecipeError("--template and --chat are for tasks in words: add --form text.")
    return found


def asked(
    task: Task,
    form: str,
    template: str | None,
    *,
    chat: bool = False,
    max_length: int | None = None,
    learnt: Learnt | None = None,
) -> Asked:
    """How a task is asked: as it is said, else as the adapter was `learnt`, else by default.

    What differs from the adapter's training is said.

    Raises:
        UnknownNameError, TaskError: a template that does not fit the task.
    """
    from orthomerge.tasks import prompt_of

    known = learnt if learnt is not None and learnt.form == form else None
    length = max_length or (known.max_length if known else LENGTH)
    prompt = None
    if form == "text":
        said = template is not None or chat
        prompt = known.prompt if known and not said else prompt_of(task, template, chat=chat)
    if known:
        _say_differences(known, prompt, length)
    return Asked(prompt, length)


def _say_differences(known: Learnt, prompt: Prompt | None, length: int) -> None:
    from orthomerge.cli._app import err

    other: list[str] = []
    if prompt != known.prompt:
        other.append("in other words")
    if length != known.max_length:
        other.append(f"at {length} tokens instead of {known.max_length}")
    if other:
        err.print(
            f"note: the task is asked {' and '.join(other)} than the adapter was trained with.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
