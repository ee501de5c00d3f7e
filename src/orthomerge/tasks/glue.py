"""GLUE's tasks from the hub, by the contract of the offline ones.

The training pool is GLUE's training split, the test pool its validation split (the matched one of
MNLI), because GLUE's own test labels are not public; the selection rows are drawn from the training
split. Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding", ICLR 2019.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

from orthomerge.errors import AssetError
from orthomerge.tasks.corpora import Pools
from orthomerge.tasks.task import Metric, Row, Task

DATASET = "nyu-mll/glue"


class Definition(NamedTuple):
    """A task of GLUE as its columns say it."""

    config: str
    title: str
    text: str
    pair: str | None
    labels: tuple[str, ...]
    metric: Metric
    test: str = "validation"


DEFINITIONS = (
    Definition("cola", "CoLA", "sentence", None, ("unacceptable", "acceptable"), "matthews"),
    Definition("sst2", "SST-2", "sentence", None, ("negative", "positive"), "accuracy"),
    Definition("mrpc", "MRPC", "sentence1", "sentence2", ("not_equivalent", "equivalent"), "f1"),
    Definition("qqp", "QQP", "question1", "question2", ("not_duplicate", "duplicate"), "f1"),
    Definition(
        "mnli",
        "MNLI (matched)",
        "premise",
        "hypothesis",
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "validation_matched",
    ),
    Definition(
        "qnli", "QNLI", "question", "sentence", ("entailment", "not_entailment"), "accuracy"
    ),
    Definition(
        "rte", "RTE", "sentence1", "sentence2", ("entailment", "not_entailment"), "accuracy"
    ),
    Definition("stsb", "STS-B", "sentence1", "sentence2", (), "pearson_spearman"),
)


def _load(config: str) -> Any:
    from datasets import load_dataset

    return load_dataset(DATASET, config)


@cache
def pools(definition: Definition) -> Pools:
    """The labelled rows of GLUE's training and validation splits.

    Raises:
        AssetError: the data set cannot be loaded.
    """
    try:
        splits = _load(definition.config)
    # The loader raises its own, its transport's and plain errors; each means there is no data.
    except Exception as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(". ")
        raise AssetError(
            f"no data for 'glue/{definition.config}': the hub's data set {DATASET} said: {reason}; "
            "the tasks without 'glue/' need no hub."
        ) from problem
    return {
        "train": _rows(definition, splits["train"]),
        "test": _rows(definition, splits[definition.test]),
    }


def _rows(definition: Definition, split: Any) -> list[Row]:
    pairs = split[definition.pair] if definition.pair else [None] * len(split)
    number = int if definition.labels else float
    return [
        Row(text, pair, number(label))
        for text, pair, label in zip(split[definition.text], pairs, split["label"], strict=True)
        if not definition.labels or label >= 0
    ]


TASKS = tuple(
    Task(
        name=f"glue/{d.config}",
        title=d.title,
        kind="classification" if d.labels else "regression",
        labels=d.labels,
        metric=d.metric,
        source=f"hub data set {DATASET}, {d.config}",
        licence="see the data set's card (GLUE's tasks have licences of their own)",
        made=f"GLUE's train split and, for the test, its {d.test} split.",
        pair=d.pair is not None,
        pools=partial(pools, d),
    )
    for d in DEFINITIONS
)
