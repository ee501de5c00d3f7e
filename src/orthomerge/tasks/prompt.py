"""A task as text to text: an instruction around its texts, and the words of its answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, cast

from orthomerge.errors import TaskError, reason, unknown_name
from orthomerge.io.documents import YAML_BYTES, parse_yaml, read_text
from orthomerge.io.files import fingerprint, local
from orthomerge.tasks.part import split_name
from orthomerge.tasks.task import Task
from orthomerge.tasks.templates import TEMPLATES, Template

FORMS = ("classifier", "text")
"""How a task is put to a model: with a head on top, or in words that it answers in words."""

PLACEHOLDERS = ("text", "pair", "answers")
FILES = (".txt", ".yaml", ".yml")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Prompt:
    """How a task is asked, and answered, in words.

    `segments` is the instruction, cut at its placeholders: a literal, then the name of what follows
    it (None at the end). `answers` are the words for each class, none for a regression, whose
    answer is a number with one decimal, as T5 answers STS-B (Raffel et al. 2020, appendix D). With
    `chat` the instruction is a user's message in the chat template of the model's tokenizer, and
    the answer is the assistant's.
    """

    segments: tuple[tuple[str, str | None], ...]
    answers: tuple[str, ...]
    chat: bool = False

    @property
    def regression(self) -> bool:
        """Whether the answer is a number."""
        return not self.answers

    @property
    def fingerprint(self) -> str:
        """The hash of all that it says."""
        said: list[Any] = [list(map(list, self.segments)), list(self.answers)]
        return fingerprint([*said, "chat"] if self.chat else said)

    def record(self) -> dict[str, Any]:
        """It as JSON, for `Prompt.of`; also what a template file holds."""
        template = "".join(
            literal.replace("{", "{{").replace("}", "}}") + (f"{{{name}}}" if name else "")
            for literal, name in self.segments
        )
        chat = {"chat": True} if self.chat else {}
        return {"prompt": template, "answers": list(self.answers), **chat}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Prompt:
        """The prompt that `record` holds.

        Raises:
            TaskError: it is no such record.
        """
        template, answers = record.get("prompt"), record.get("answers")
        if not isinstance(template, str) or not isinstance(answers, list):
            raise TaskError("the record of a prompt holds no 'prompt' or no 'answers'.")
        segments = tuple((literal, name) for literal, name, _, _ in Formatter().parse(template))
        words = tuple(str(answer) for answer in cast(list[Any], answers))
        return cls(segments, words, bool(record.get("chat", False)))

    def ask(self, text: str, pair: str | None = None) -> str:
        """The instruction with the texts in it; braces in a text are a text's."""
        said = {"text": text, "pair": pair or "", "answers": listed(self.answers)}
        return "".join(literal + (said[name] if name else "") for literal, name in self.segments)

    def fitted(
        self, text: str, pair: str | None, fits: Callable[[str], bool], room: str = "the model"
    ) -> str:
        """The instruction with as much of the texts as `fits`: it is the texts that are cut.

        Both are held to one length, so that the longer one is cut first.

        Raises:
            TaskError: the instruction alone does not fit `room`.
        """
        asked = self.ask(text, pair)
        if fits(asked):
            return asked
        low, high = 0, max(len(text), len(pair or ""))
        while low < high:
            middle = (low + high + 1) // 2
            if fits(self._cut(text, pair, middle)):
                low = middle
            else:
                high = middle - 1
        asked = self._cut(text, pair, low)
        if not low and not fits(asked):
            raise TaskError(
                f"the instruction '{asked[:40]}…' leaves no room for a text in {room}: shorten it, "
                "or raise the maximal length."
            )
        return asked

    def _cut(self, text: str, pair: str | None, size: int) -> str:
        return self.ask(text[:size].rstrip(), None if pair is None else pair[:size].rstrip())

    def answer(self, label: int | float) -> str:
        """What a row's label is called."""
        if self.regression:
            return f"{round(float(label), 1) + 0.0:.1f}"  # + 0.0: no minus before a zero
        return self.answers[int(label)]

    def read(self, answer: str) -> int | float | None:
        """The label of an answer in the model's own words, None where it is none.

        The first line counts; letters' case, spaces around and a full stop at the end do not.
        """
        first = answer.strip().split("\n")[0]
        if self.regression:
            found = _NUMBER.search(first)
            return float(found[0]) if found else None
        known = {_plain(said): label for label, said in enumerate(self.answers)}
        return known.get(_plain(first))


def prompt_of(
    task: Task,
    template: str | Mapping[str, Any] | Template | None = None,
    *,
    chat: bool = False,
) -> Prompt:
    """The prompt of a task: its own, or by a template of the user's.

    Args:
        task: the task.
        template: an instruction with `{text}`, for pairs `{pair}`, and perhaps `{answers}` (the
            answers in a list); a file that holds one (.txt), or a mapping or YAML file of `prompt`
            and `answers`: a list in the order of the task's labels, or words by label; it may say
            `chat: true` too.
        chat: whether the instruction goes through the chat template of the model's tokenizer.

    Raises:
        UnknownNameError: a placeholder, key or label that does not exist.
        TaskError: a template without its texts, an unreadable file, or answers that are not one
            for each label or that cannot be distinguished.
    """
    if template is None:
        whole = split_name(task.name)
        found = TEMPLATES.get(whole[0] if whole else task.name) or _plain_template(task)
        where = f"the template of '{task.name}'"
    else:
        found, where = _read(template)
    return Prompt(
        _segments(found.prompt, task, where),
        _answers(found.answers, task, where),
        chat or found.chat,
    )


def _plain_template(task: Task) -> Template:
    """For a table of the user's, of which nothing is known but its columns."""
    texts = "Text 1: {text}\nText 2: {pair}" if task.pair else "Text: {text}"
    asked = "Answer with one of: {answers}." if task.labels else "Answer with a number."
    return Template(f"{texts}\n{asked}\nAnswer:")


def _read(template: str | Mapping[str, Any] | Template) -> tuple[Template, str]:
    if isinstance(template, Template):
        return template, "the template"
    where, values = "the template", template
    if isinstance(template, str) and template.endswith(FILES):
        where = f"template '{template}'"
        try:
            text = read_text(local(template), YAML_BYTES)
            values = text.rstrip("\n") if template.endswith(".txt") else parse_yaml(text)
        except (OSError, ValueError) as problem:
            raise TaskError(f"{where} cannot be read: {reason(problem)}.") from problem
    if isinstance(values, str):
        return Template(values), where
    if not isinstance(values, Mapping) or not isinstance(values.get("prompt"), str):
        raise TaskError(f"{where} has no 'prompt': write an instruction with {{text}} under it.")
    values = cast(Mapping[str, Any], values)
    for key in values:
        if key not in Template._fields:
            raise unknown_name("key", str(key), Template._fields, where=where)
    chat = values.get("chat", False)
    if not isinstance(chat, bool):
        raise TaskError(f"{where}: 'chat' is true or false, not '{chat}'.")
    return Template(values["prompt"], values.get("answers"), chat), where


def _segments(template: str, task: Task, where: str) -> tuple[tuple[str, str | None], ...]:
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as problem:
        raise TaskError(f"{where}: {problem}; write {{{{ and }}}} for plain braces.") from problem
    segments = tuple((literal, name) for literal, name, _, _ in parsed)
    named = [name for _, name in segments if name is not None]
    for name in named:
        if name not in PLACEHOLDERS:
            raise unknown_name("placeholder", name, PLACEHOLDERS, where=where)
    for name in ("text", "pair") if task.pair else ("text",):
        if name not in named:
            raise TaskError(f"{where} has no {{{name}}}, which the task '{task.name}' needs.")
    if "pair" in named and not task.pair:
        raise TaskError(f"{where} names {{pair}}, but the task '{task.name}' has one text a row.")
    return segments


def _answers(
    given: Sequence[Any] | Mapping[Any, Any] | None, task: Task, where: str
) -> tuple[str, ...]:
    if given is not None and not task.labels:
        raise TaskError(f"{where}: the task '{task.name}' is answered by a number; leave answers.")
    if given is None:
        found = [label.replace("_", " ") for label in task.labels]
    elif isinstance(given, Mapping):
        words = {str(label): said for label, said in given.items()}
        for label in words:
            if label not in task.labels:
                raise unknown_name("label", label, task.labels, where=f"the answers of {where}")
        found = [str(words.get(label, label)) for label in task.labels]
    else:
        found = [str(said) for said in given] if not isinstance(given, str) else [given]
        if len(found) != len(task.labels):
            raise TaskError(
                f"{where} has {len(found)} answers, the task '{task.name}' has {len(task.labels)} "
                f"labels: give one for each of {', '.join(task.labels)}."
            )
    found = [said.strip() for said in found]
    if len(set(map(_plain, found))) < len(found) or not all(map(_plain, found)):
        raise TaskError(f"{where}: the answers {listed(found)} are too alike: reword them.")
    return tuple(_ended(found))


def _ended(answers: Sequence[str]) -> list[str]:
    """Answers none of which begins another: a likelihood would never prefer the longer of those."""
    pairs = [(a, b) for a in answers for b in answers if a != b]
    return (
        [f"{said}." for said in answers] if any(b.startswith(a) for a, b in pairs) else [*answers]
    )


def _plain(said: str) -> str:
    return " ".join(said.split()).rstrip(".").lower()


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b or c."""
    bare = [word.rstrip(".") for word in words]
    return " or ".join(filter(None, [", ".join(bare[:-1]), *bare[-1:]]))


def number_or_mean(values: Sequence[float | None]) -> list[float]:
    """Values read off answers; where there was no number, the mean of those that are there.

    The mean orders nothing, so an answer without a number is worth nothing.
    """
    there = [v for v in values if v is not None and math.isfinite(v)]
    mean = sum(there) / len(there) if there else 0.0
    return [v if v is not None and math.isfinite(v) else mean for v in values]
