"""GLUE's definitions against data sets made here with the same columns."""

from __future__ import annotations

import datasets
import pytest
from datasets import Dataset
from five_architectures import write_glue

from orthomerge.errors import AssetError
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


@pytest.fixture
def bare_folder(tmp_path, monkeypatch):
    """A folder with nothing but Parquet files, in place of the data set."""
    folder = write_glue(tmp_path / "glue")
    monkeypatch.setenv(glue_module.FOLDER_VARIABLE, str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    glue_module.pools.cache_clear()
    yield folder
    assert not (tmp_path / "cache").exists()
    glue_module.pools.cache_clear()


@pytest.mark.parametrize("definition", glue_module.DEFINITIONS, ids=lambda d: d.config)
def test_a_folder_with_nothing_but_parquet_files(bare_folder, definition):
    folder = bare_folder / definition.config
    assert {p.suffix for p in bare_folder.rglob("*") if p.is_file()} == {".parquet"}
    pools = get_task(f"glue/{definition.config}").pools()
    for pool, split in (("train", "train"), ("test", definition.test)):
        (file,) = folder.glob(f"{split}-*.parquet")
        written = Dataset.from_parquet(str(file), cache_dir=str(folder / "oracle"))
        assert [row.text for row in pools[pool]] == list(written[definition.text])
        assert [row.label for row in pools[pool]] == list(written["label"])


def test_a_split_in_several_files_is_read_in_their_order(bare_folder):
    folder = bare_folder / "sst2"
    (file,) = folder.glob("train-*.parquet")
    whole = glue_module._read_folder(folder)["train"]
    file.unlink()
    for number in range(3):
        part = whole.shard(3, number, contiguous=True)
        part.to_parquet(folder / f"train-0000{number}-of-00003.parquet")
    rows = get_task("glue/sst2").pools()["train"]
    assert [row.text for row in rows] == list(whole["sentence"])


def test_a_folder_without_the_configuration_says_what_it_must_hold(bare_folder):
    for file in (bare_folder / "rte").iterdir():
        file.unlink()
    with pytest.raises(AssetError, match=r"no Parquet file in .*rte.*must hold rte/train-\*"):
        get_task("glue/rte").pools()


def test_files_of_another_data_set_are_refused(bare_folder):
    (file,) = (bare_folder / "rte").glob("train-*.parquet")
    file.write_bytes(b"not Parquet")
    with pytest.raises(AssetError, match="no data for 'glue/rte'"):
        get_task("glue/rte").pools()
