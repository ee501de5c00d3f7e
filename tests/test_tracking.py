"""The Trainer's trackers write where the run is, and change nothing else."""

from __future__ import annotations

import os

import pytest
from conftest import tiny_bert, write_task

from orthomerge.adapters import new_lora, save_start
from orthomerge.errors import RecipeError
from orthomerge.experiment import parse_recipe
from orthomerge.tasks import get_task
from orthomerge.tracking import check_trackers
from orthomerge.training import TrainingSettings, train_adapter

RECIPE = {
    "name": "x",
    "base": "minilm",
    "tasks": ["sentiment", "topic"],
    "arms": {"default": {"start": "default"}},
    "merges": [{"method": "linear"}],
}


def test_tensorboard_files_lie_beside_the_adapter(tmp_path, tiny_tokenizer, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    model = new_lora(tiny_bert(), targets=["query"], rank=2, alpha=4, task_type="SEQ_CLS", seed=0)
    save_start(model, tmp_path / "start")
    rows = get_task(str(write_task(tmp_path / "t.jsonl"))).data(train=64).train
    settings = TrainingSettings(epochs=6, batch_size=16, max_length=16)
    for name, report_to in (("followed", ["tensorboard"]), ("alone", [])):
        train_adapter(
            tiny_bert(), tmp_path / "start", rows, tiny_tokenizer, regression=False,
            settings=settings, output=tmp_path / name, report_to=report_to,
        )  # fmt: skip
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    events = reader.EventAccumulator(str(tmp_path / "logs" / "followed"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [10, 20]
    assert not (tmp_path / "logs" / "alone").exists()
    file = "adapter_model.safetensors"
    weights = {(tmp_path / name / file).read_bytes() for name in ("followed", "alone")}
    assert len(weights) == 1


def test_unknown_trackers_are_named():
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(RecipeError, match="unknown tracker"):
        parse_recipe(RECIPE | {"training": {"report_to": "nowhere"}})


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("orthomerge.tracking.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_trackers_change_no_key():
    pytest.importorskip("tensorboard")
    told = parse_recipe(RECIPE | {"training": {"report_to": "tensorboard"}})
    assert told.training.report_to == ["tensorboard"]
    for task in RECIPE["tasks"]:
        assert told.training.content(task) == parse_recipe(RECIPE).training.content(task)
