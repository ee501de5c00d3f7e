"""The paper's recipes on tiny models of the real classes and a copy of GLUE's layout."""

from __future__ import annotations

import json

import datasets
import pytest
from conftest import call
from five_architectures import MODELS, model_of, write_glue

from orthomerge.adapters import read_adapter
from orthomerge.experiment import load_recipe, packaged_recipes
from orthomerge.io.rows import read_rows
from orthomerge.tasks import glue

PAPER = sorted(MODELS)
METHODS = {"task_arithmetic", "ties", "fisher", "regmean", "emr"}
SMALL = {"data.train": 24, "data.selection": 6, "data.test": 10, "statistics.samples": 6}


@pytest.fixture(scope="module")
def glue_copy(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue") / "copy")


@pytest.fixture
def local_glue(glue_copy, tmp_path, monkeypatch):
    """`load_dataset` as it is; only where its files come from is another place."""
    monkeypatch.setenv(glue.FOLDER_VARIABLE, str(glue_copy))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    glue.pools.cache_clear()
    yield
    glue.pools.cache_clear()


def settings(changes):
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("name", PAPER)
def test_the_published_settings_are_in_the_recipe(name):
    recipe, _ = load_recipe(f"paper/{name}.yaml")
    assert set(recipe.tasks) == {f"glue/{d.config}" for d in glue.DEFINITIONS}
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (8, 16, 0)
    assert recipe.statistics.samples == 100
    part = recipe.training
    assert (part.learning_rate, part.batch_size, part.weight_decay) == (4e-4, 64, 0)
    assert (part.warmup, part.precision) == (0.06, "bf16")
    assert (recipe.data.train, recipe.data.at_most, recipe.data.test) == (105000, True, "all")
    assert recipe.data.max_length == 128
    epochs = {t.removeprefix("glue/"): part.epochs_of(t) for t in recipe.tasks}
    short = {"qnli", "qqp", "sst2"} if "llama" in name else set()
    for task, found in epochs.items():
        assert found == (2 if task in short else 5 if "llama" in name else 10)
    assert {m.method for m in recipe.merges} == METHODS


def test_the_variant_with_keys_trains_longer_and_one_task_slower():
    recipe, _ = load_recipe("paper/roberta-large-qkv.yaml")
    assert recipe.adapter.targets == ["query", "key", "value"]
    part = recipe.training
    epochs = {t.removeprefix("glue/"): part.epochs_of(t) for t in recipe.tasks}
    ten = {"sst2", "qqp", "qnli", "mnli"}
    assert epochs == {t: 10 if t in ten else 20 for t in epochs}
    rates = {t.removeprefix("glue/"): part.rate_of(t, 4e-4) for t in recipe.tasks}
    assert rates == {t: 2e-4 if t == "rte" else 4e-4 for t in rates}


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_recipe_is_valid_and_runs_dry(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(glue.FOLDER_VARIABLE, raising=False)
    recipe, _ = load_recipe(name)
    said = call("run", f"recipes/{name}", "--dry-run", "--speed", "h100", "--json")
    found = json.loads(said[said.index("{") :])  # a base dequantised here is named on stderr
    trained = sum(len(recipe.tasks_of(a)) * len(recipe.seeds_of(a)) for a in recipe.arms)
    assert found["jobs"]["train"] + found["jobs"].get("convert", 0) >= trained
    assert found["rows"] > trained and found["there"] == 0
    assert list(tmp_path.iterdir()) == []
    if "glue/cola" in recipe.tasks:
        assert found["data"]["glue/cola"] == "would be downloaded from the hub"
        if not name.startswith("glue/"):  # whose bases are packages
            assert found["base"] == "would be downloaded from the hub"
        assert "is valid" in call("run", name, "--dry-run", "--speed", "h100")


def run_small(name, tmp_path, changes):
    folder, output = model_of(name, tmp_path / "model"), tmp_path / "run"
    arguments = ["run", f"recipes/paper/{name}.yaml", "--base", folder, "--output", output]
    said = call(*arguments, *settings(SMALL | changes), "--quiet")
    rows = read_rows(output / "results.jsonl")
    again = call(*arguments, *settings(SMALL | changes), "--dry-run", "--json")
    assert json.loads(again)["jobs"] == {}
    return said, rows, output


def check(name, said, rows, output):
    recipe, _ = load_recipe(f"paper/{name}.yaml")
    assert {r.method for r in rows if r.split == "test"} == METHODS | {"single"}
    assert all(abs(r.value) <= 1 for r in rows)
    metrics = {r.task: r.metric for r in rows}
    assert metrics["glue/cola"] == "matthews" and metrics["glue/stsb"] == "pearson_spearman"
    # Heads are learnt and kept with every adapter, whatever their name.
    for folder in (output / "adapters").glob("*/seed0/*"):
        adapter = read_adapter(folder)
        assert adapter.modules and adapter.layers
        assert all(f.B.any() for f in adapter.layers.values())
    if recipe.known:
        for words in ("70.04", "76.59", "without OSRM *", "unconfirmed", "F1/acc", "STS-B"):
            assert words in said, words
        assert "| *with OSRM* |" in call("report", output, "--markdown")


@pytest.mark.parametrize("name", ["roberta-large", "t5-large", "llama-3.2-1b"])
def test_an_architecture_end_to_end_on_three_tasks(name, local_glue, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    changes = {
        "tasks": "[glue/cola, glue/mrpc, glue/stsb]",
        "arms": "{osrm: {start: min_eigen}}",
        "merges": "[" + ", ".join(f"{{method: {m}}}" for m in sorted(METHODS)) + "]",
        "training.tasks": "{glue/cola: {epochs: 2}}",
        "training.epochs": 1,
        "training.batch_size": 8,
    }
    check(name, *run_small(name, tmp_path, changes))


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_of_the_paper_end_to_end(name, local_glue, tmp_path, monkeypatch):
    """As it is, but for base, rows, epochs and batch: all arms, tasks, methods."""
    monkeypatch.setenv("COLUMNS", "160")
    # The one step of a single batch would be the warm-up's, at the rate 0.
    changes = {"training.epochs": 1, "training.batch_size": 8}
    said, rows, output = run_small(name, tmp_path, changes)
    check(name, said, rows, output)
    assert {r.task for r in rows} == {f"glue/{d.config}" for d in glue.DEFINITIONS}
    assert {r.arm for r in rows} == set(load_recipe(f"paper/{name}.yaml")[0].arms)
