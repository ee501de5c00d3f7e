"""The teachers: each adapter with its own head, and the texts of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from orthomerge.adapters import Adapter, read_adapter, require_same_base
from orthomerge.adapters.output import distinct_names
from orthomerge.errors import AdapterError, MergeError, UnknownNameError, unknown_name
from orthomerge.statistics import read_texts, sample_texts
from orthomerge.training.distillation.settings import PROBLEMS

Text = tuple[str, str | None]
Texts = str | Path | Sequence[str | Text]
"""Texts of one task: a file or data set, or texts and pairs of texts."""

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class Teacher:
    """One task: the adapter that does it alone, its head, and the texts to answer.

    `problem` says what the head's outputs are; `outputs` how many there are.
    """

    name: str
    adapter: Adapter
    head: Mapping[str, Tensor]
    texts: list[Text]
    problem: str
    outputs: int


def read_teachers(
    adapters: Sequence[str | Path | Adapter],
    texts: Sequence[Texts],
    *,
    base: str | None = None,
    samples: int = 100,
    seed: int = 0,
    problems: Sequence[str | None] | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
) -> list[Teacher]:
    """The adapters with their heads, and `samples` texts of each one's task, drawn under `seed`.

    Raises:
        AdapterError: no adapters, unreadable ones, different bases, biases that were trained, or a
            head that is missing.
        MergeError: texts or problems that are not one per adapter, or too few texts.
        StatisticsError: texts that cannot be read.
    """
    if not adapters:
        raise AdapterError("nothing to distill: name at least one adapter folder.")
    if len(texts) != len(adapters):
        raise MergeError(
            f"{len(texts)} lists of texts for {len(adapters)} adapters: give one (--data) for each "
            "adapter, in their order."
        )
    if problems is not None and len(problems) != len(adapters):
        raise MergeError(
            f"{len(problems)} problems for {len(adapters)} adapters: give one for each, in order."
        )
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=base) for a in adapters]
    require_same_base(read, base=base)
    for adapter in read:
        _check(adapter)
    names = distinct_names(read)
    found: list[Teacher] = []
    for place, (adapter, name) in enumerate(zip(read, names, strict=True)):
        drawn = _drawn(texts[place], name, samples, seed, text_column, pair_column)
        outputs = _outputs(adapter)
        problem = _problem(problems[place] if problems else None, outputs)
        found.append(Teacher(name, adapter, adapter.modules, drawn, problem, outputs))
    return found


def _check(adapter: Adapter) -> None:
    kind = adapter.config.get("task_type")
    if adapter.biases:
        raise AdapterError(
            f"'{adapter.called}' trained biases (lora_bias), which a merge sums and does not "
            "train: distill adapters without them."
        )
    if kind in CLASSIFIERS and not adapter.modules:
        raise AdapterError(
            f"'{adapter.called}' carries no head, so its answers are not known: train it with "
            "modules_to_save naming the classification head."
        )


def _outputs(adapter: Adapter) -> int:
    """How many outputs the head has: its narrowest matrix is the last."""
    rows = [t.shape[0] for t in adapter.modules.values() if t.ndim == 2]
    return min(rows, default=0)


def _problem(named: str | None, outputs: int) -> str:
    if named is not None and named not in PROBLEMS:
        raise unknown_name("problem", named, PROBLEMS, error=MergeError)
    return named or ("regression" if outputs == 1 else "single_label_classification")


def _drawn(
    source: Texts, name: str, samples: int, seed: int, text_column: str, pair_column: str | None
) -> list[Text]:
    if isinstance(source, str | Path):
        found = _read(source, text_column, pair_column)
    else:
        found = [(item, None) if isinstance(item, str) else item for item in source]
    if len(found) < 2:
        raise MergeError(f"{len(found)} texts for '{name}': a task needs at least two.")
    return sample_texts(found, samples, seed)


def _read(source: str | Path, text_column: str, pair_column: str | None) -> list[Text]:
    """The texts of a file or data set, with the second texts of its column `pair` if it has one."""
    if pair_column is not None:
        return read_texts(source, text_column=text_column, pair_column=pair_column)
    try:
        return read_texts(source, text_column=text_column, pair_column="pair")
    except UnknownNameError:
        return read_texts(source, text_column=text_column)
