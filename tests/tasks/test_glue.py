"""GLUE's definitions against data sets made here with the same columns."""

from __future__ import annotations

import pytest
from datasets import Dataset

from orthomerge.tasks import get_task
from orthomerge.tasks import glue as glue_module

SINGLE = ("cola", "sst2")


def columns(definition, count, prefix):
    labels = len(definition.labels)
    out = {
        definition.text: [f"{prefix} text {i}" for i in range(count)],
        "label": [i % labels if labels else i / 5 for i in range(count)],
        "idx": list(range(count)),
    }
    if definition.pair:
        out[definition.pair] = [f"{prefix} pair {i}" for i in range(count)]
    return out


@pytest.fixture
def local_hub(monkeypatch):
    """The loader gives data sets of GLUE's columns, made here."""
    by_config = {d.config: d for d in glue_module.DEFINITIONS}

    def load(config):
        d = by_config[config]
        splits = {"train": columns(d, 60, "train"), d.test: columns(d, 30, "validation")}
        if config == "mnli":
            splits["validation_mismatched"] = columns(d, 30, "mismatched")
        unlabelled = columns(d, 10, "test")
        unlabelled["label"] = [-1] * 10
        return {k: Dataset.from_dict(v) for k, v in {**splits, "test": unlabelled}.items()}

    glue_module.pools.cache_clear()
    monkeypatch.setattr(glue_module, "_load", load)
    yield
    glue_module.pools.cache_clear()


@pytest.mark.parametrize("definition", glue_module.DEFINITIONS, ids=lambda d: d.config)
def test_every_task_by_the_contract(local_hub, definition):
    task = get_task(f"glue/{definition.config}")
    data = task.data(train=30, selection=10, test=20)
    assert task.pair == (definition.config not in SINGLE)
    assert all(r.text.startswith("train") for r in data.train + data.selection)
    assert all(r.text.startswith("validation") for r in data.test)
    assert not {r.text for r in data.train} & {r.text for r in data.selection}
    assert all((r.pair is not None) == task.pair for r in data.train)
    if task.kind == "regression":
        assert definition.config == "stsb" and isinstance(data.train[0].label, float)
    else:
        assert {r.label for r in data.train} == set(range(len(task.labels)))


def test_metrics_are_glues():
    metrics = {d.config: d.metric for d in glue_module.DEFINITIONS}
    assert metrics == {
        "cola": "matthews",
        "sst2": "accuracy",
        "mrpc": "f1",
        "qqp": "f1",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
        "stsb": "pearson_spearman",
    }
