"""GLUE's tasks from the hub or a folder laid out as there, by the contract of the offline ones.

The training pool is GLUE's training split, the test pool its validation split (the matched one of
MNLI), because GLUE's own test labels are not public; the selection rows are drawn from the training
split. Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding", ICLR 2019.
"""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from orthomerge.errors import AssetError, reason
from orthomerge.io.files import local
from orthomerge.models.hub import hub_reason
from orthomerge.tasks.corpora import Pools
from orthomerge.tasks.task import Metric, Row, Task

DATASET = "nyu-mll/glue"
FOLDER_VARIABLE = "ORTHOMERGE_GLUE"
"""Names a folder with a copy of the data set: `<config>/<split>-*.parquet`, as on the hub."""


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
    """The splits of a configuration, by name."""
    from datasets import load_dataset  # pyright: ignore[reportUnknownVariableType]

    if folder := os.environ.get(FOLDER_VARIABLE):
        return _read_folder(local(folder) / config)
    return load_dataset(DATASET, config)


def _read_folder(folder: Path) -> dict[str, Any]:
    """The splits in a folder of Parquet files, `<split>-*.parquet` or `<split>.parquet`.

    The files are read as they lie there: no cache is written, and the folder needs nothing else.
    """
    from datasets import Dataset, concatenate_datasets
    from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]

    def read(path: Path) -> Dataset:
        return Dataset(cast(Any, parquet).read_table(path))

    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        files.setdefault(path.stem.split("-")[0], []).append(path)
    if not files:
        raise FileNotFoundError(f"there is no Parquet file in '{folder}'")
    return {
        split: concatenate_datasets([read(path) for path in paths])
        for split, paths in files.items()
    }


@cache
def pools(definition: Definition) -> Pools:
    """The labelled rows of GLUE's training and validation splits.

    Raises:
        AssetError: the data set cannot be loaded, or is another one than GLUE.
    """
    config = definition.config
    try:
        splits = _load(config)
    # The loader raises its own, its transport's and plain errors; each means there is no data.
    except Exception as problem:
        if folder := os.environ.get(FOLDER_VARIABLE):
            raise AssetError(
                f"no data for 'glue/{config}' in {FOLDER_VARIABLE} '{folder}': {reason(problem)}; "
                f"it must hold {config}/train-*.parquet and so on, as {DATASET} does."
            ) from problem
        raise AssetError(
            f"no data for 'glue/{config}' ({DATASET}): {hub_reason(problem, 'data set')}; "
            f"{FOLDER_VARIABLE} names such a folder, and the tasks without 'glue/' need no hub."
        ) from problem
    return {
        "train": _rows(definition, splits, "train"),
        "test": _rows(definition, splits, definition.test),
    }


def _rows(definition: Definition, splits: Any, name: str) -> list[Row]:
    d = definition
    if name not in splits:
        raise AssetError(
            f"the data of 'glue/{d.config}' has no split '{name}', only "
            f"{', '.join(map(str, splits))}: it is not the data set {DATASET}."
        )
    split = splits[name]
    wanted = [d.text, *([d.pair] if d.pair else []), "label"]
    missing = [column for column in wanted if column not in split.column_names]
    if missing:
        raise AssetError(
            f"the data of 'glue/{d.config}' has no column '{missing[0]}', only "
            f"{', '.join(split.column_names)}: it is not the data set {DATASET}."
        )
    names = getattr(split.features["label"], "names", None)
    if names and tuple(names) != d.labels:
        raise AssetError(
            f"the labels of 'glue/{d.config}' are {', '.join(names)}, not {', '.join(d.labels)}: "
            f"it is not the data set {DATASET}."
        )
    pairs = split[d.pair] if d.pair else [None] * len(split)
    number = int if d.labels else float
    return [
        Row(text, pair, number(label))
        for text, pair, label in zip(split[d.text], pairs, split["label"], strict=True)
        if not d.labels or label >= 0
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
