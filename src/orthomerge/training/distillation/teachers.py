"""The teachers: each adapter with its own head, and the texts of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from orthomerge.adapters import (
    Adapter,
    align_adapters,
    read_adapter,
    read_head,
    require_runnable,
    require_same_base,
)
from orthomerge.adapters.output import distinct_names
from orthomerge.errors import AdapterError, MergeError, UnknownNameError, unknown_name
from orthomerge.io.names import HEADS, MERGE
from orthomerge.records import Learnt, learnt_by, record_of
from orthomerge.statistics import read_texts, sample_texts
from orthomerge.tasks import Prompt
from orthomerge.training.distillation.settings import FORMS, PROBLEMS

Text = tuple[str, str | None]
Texts = str | Path | Sequence[str | Text]
"""Texts of one task: a file or data set, or texts and pairs of texts."""

_FORM_OF = {
    "SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "CAUSAL_LM": "text",
    "SEQ_2_SEQ_LM": "text", "FEATURE_EXTRACTION": "embedding",
}  # fmt: skip
_HEAD_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Teacher:
    """One task: the adapter that does it alone, with its head as `modules`, and texts to answer.

    Several tasks may share one adapter, a merge with a head for each: `part` is the adapter's
    number. `problem` says what the head's outputs are, `outputs` how many there are; `prompt` is
    how a language model is asked, and `max_length` the tokens it learnt with, where its record says
    them; `kind` is PEFT's task type.
    """

    name: str
    adapter: Adapter
    part: int
    texts: list[Text]
    problem: str = ""
    outputs: int = 0
    prompt: Prompt | None = None
    kind: str | None = None
    max_length: int | None = None

    @property
    def head(self) -> Mapping[str, Tensor]:
        """The weights of the task's own head."""
        return self.adapter.modules


@dataclass(frozen=True)
class TextSource:
    """Where texts are read from, and how many."""

    samples: int = 100
    seed: int = 0
    text_column: str = "text"
    pair_column: str | None = None


def read_teachers(
    adapters: Sequence[str | Path | Adapter],
    texts: Sequence[Texts],
    source: TextSource,
    *,
    base: str | None = None,
    problems: Sequence[str | None] | None = None,
    prompts: Sequence[Prompt | None] | None = None,
) -> list[Teacher]:
    """The adapters with their heads, and texts of each one's task.

    A merge's folder with several heads under `heads/` is one adapter that teaches a task for each
    head, all on the same texts; a head's file in it (`merged/heads/a.safetensors`) is one of these
    tasks, on texts of its own. Without `prompts` each is asked as its record says that it was
    trained.

    Raises:
        AdapterError: no adapters, unreadable ones, different bases, or biases that were trained.
        MergeError: texts, problems or prompts that are not one for each adapter, or too few texts.
        StatisticsError: texts that cannot be read.
    """
    if not adapters:
        raise AdapterError("nothing to distill: name at least one adapter folder.")
    for given, what in ((texts, "lists of texts (--data)"), (problems, "problems (--problem)"),
                        (prompts, "prompts")):  # fmt: skip
        if given is not None and len(given) != len(adapters):
            raise MergeError(
                f"{len(given)} {what} for {len(adapters)} adapters: give one for each adapter, in "
                "their order."
            )
    found: list[Teacher] = []
    parts: list[Adapter] = []
    for place, named in enumerate(adapters):
        read, heads = _opened(named, base)
        (read,) = align_adapters([read], base=base)
        require_runnable(read)
        part = next((i for i, known in enumerate(parts) if _same(known, read)), len(parts))
        parts += [read] if part == len(parts) else []
        drawn = _drawn(texts[place], read.called, source)
        for name, head in heads.items():
            outputs = _outputs(head)
            problem = _problem(problems[place] if problems else None, outputs)
            adapter = replace(parts[part], name=name, modules=head)
            learnt = _learnt(read)
            prompt = prompts[place] if prompts else learnt and learnt.prompt
            length = learnt.max_length if learnt and learnt.prompt else None
            how = (prompt, _kind(read), length)
            found.append(Teacher(name, adapter, part, drawn, problem, outputs, *how))
    require_same_base(parts, base=base)
    names = distinct_names([t.adapter for t in found])
    return [
        replace(t, name=name, adapter=replace(t.adapter, name=name))
        for t, name in zip(found, names, strict=True)
    ]


def _learnt(adapter: Adapter) -> Learnt | None:
    """The one task that the adapter's record says it learnt."""
    learnt = learnt_by(adapter.path)
    return learnt[0] if len(learnt) == 1 else None


def parts_of(teachers: Sequence[Teacher]) -> list[Adapter]:
    """The adapters that teach, each once."""
    numbers = sorted({t.part for t in teachers})
    return [next(t.adapter for t in teachers if t.part == number) for number in numbers]


def form_of_adapters(
    adapters: Sequence[str | Path | Adapter], form: str | None = None, *, base: str | None = None
) -> str:
    """What kind of tasks adapters are for; it raises what `form_of` does."""
    found: list[Teacher] = []
    for part, named in enumerate(adapters):
        read, heads = _opened(named, base)
        adapter = replace(read, modules=next(iter(heads.values())))
        found.append(Teacher(read.name, adapter, part, [], kind=_kind(read)))
    return form_of(found, form)


def form_of(teachers: Sequence[Teacher], form: str | None) -> str:
    """What kind of tasks these are: "classifier", "text" or "embedding".

    Raises:
        UnknownNameError: no such form.
        AdapterError: adapters of several forms, of another one than named, or that do not say.
    """
    if form is not None and form not in FORMS:
        raise unknown_name("form", form, FORMS, error=MergeError)
    found = {_FORM_OF[t.kind]: t for t in teachers if t.kind in _FORM_OF}
    if not found and all(t.head for t in teachers):
        found = {"classifier": teachers[0]}  # a merge whose heads lie beside it
    for kind, teacher in found.items():
        if form not in (None, kind) or len(found) > 1:
            other = form or next(k for k in found if k != kind)
            raise AdapterError(
                f"'{teacher.adapter.called}' is of the form '{kind}', not '{other}' like the rest: "
                "distill adapters of one form together."
            )
    chosen = form or next(iter(found), None)
    if chosen is None:
        raise AdapterError(
            f"'{teachers[0].adapter.called}' does not say what kind of task it is for (task_type): "
            f"name the form with form (--form), one of {', '.join(FORMS)}."
        )
    return chosen


def _opened(
    named: str | Path | Adapter, base: str | None
) -> tuple[Adapter, dict[str, Mapping[str, Tensor]]]:
    """An adapter, and each of its heads by the name of its task."""
    if isinstance(named, Adapter):
        return named, {named.name: named.modules}
    path = Path(named)
    if path.suffix == _HEAD_SUFFIX and path.parent.name == HEADS:
        return read_adapter(path.parent.parent, base=base), {path.stem: read_head(path)}
    read = read_adapter(named, base=base)
    beside = sorted((path / HEADS).glob(f"*{_HEAD_SUFFIX}")) if not read.modules else []
    return read, {file.stem: read_head(file) for file in beside} or {read.name: read.modules}


def _kind(adapter: Adapter) -> str | None:
    """PEFT's task type; a merge whose heads lie beside it has it in its record alone."""
    said = adapter.config.get("task_type")
    if said is None and adapter.path is not None and (adapter.path / MERGE).is_file():
        said = record_of(adapter.path, MERGE).get("task_type")
    return said if isinstance(said, str) else None


def _same(one: Adapter, other: Adapter) -> bool:
    return one is other or (one.path is not None and one.path == other.path)


def _outputs(head: Mapping[str, Tensor]) -> int:
    """How many outputs a head has: its narrowest matrix is the last."""
    return min((t.shape[0] for t in head.values() if t.ndim == 2), default=0)


def _problem(named: str | None, outputs: int) -> str:
    if named is not None and named not in PROBLEMS:
        raise unknown_name("problem", named, PROBLEMS, error=MergeError)
    return named or ("regression" if outputs == 1 else "single_label_classification")


def _drawn(texts: Texts, called: str, source: TextSource) -> list[Text]:
    if isinstance(texts, str | Path):
        found = _read(texts, source)
    else:
        found = [(item, None) if isinstance(item, str) else item for item in texts]
    if len(found) < 2:
        raise MergeError(f"{len(found)} texts for '{called}': a task needs at least two.")
    return sample_texts(found, source.samples, source.seed)


def _read(texts: str | Path, source: TextSource) -> list[Text]:
    """The texts of a file or data set, with the second texts of its column `pair` if it has one."""
    text = source.text_column
    if source.pair_column is not None:
        return read_texts(texts, text_column=text, pair_column=source.pair_column)
    try:
        return read_texts(texts, text_column=text, pair_column="pair")
    except UnknownNameError:
        return read_texts(texts, text_column=text)
