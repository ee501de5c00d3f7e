"""The Trainer's trackers write where the run is, and change nothing else."""

from __future__ import annotations

import os

import pytest
from conftest import tiny_bert, write_task

from orthomerge.adapters import new_lora, save_start
from orthomerge.errors import RecipeError
from orthomerge.experiment import parse_recipe
from orthomerge.tasks import get_task
from orthomerge.training import TrainingSettings, train_adapter
from orthomerge.training.tracking import check_trackers

RECIPE = {
    "name": "x",
    "base": "minilm",
    "tasks": ["sentiment", "topic"],
    "arms": {"default": {"start": "default"}},
    "merges": [{"method": "linear"}],
}


@pytest.fixture
def train(tmp_path, tiny_tokenizer):
    """Trains one small adapter twenty steps; the start is the same for all of a test."""
    model = new_lora(tiny_bert(), targets=["query"], rank=2, alpha=4, task_type="SEQ_CLS", seed=0)
    save_start(model, tmp_path / "start")
    rows = get_task(str(write_task(tmp_path / "t.jsonl"))).data(train=64).train
    settings = TrainingSettings(epochs=6, batch_size=16, max_length=16)

    def trained(name: str, *report_to: str) -> bytes:
        train_adapter(
            tiny_bert(), tmp_path / "start", rows, tiny_tokenizer, regression=False,
            settings=settings, output=tmp_path / name, report_to=report_to,
        )  # fmt: skip
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    return trained


def test_tensorboard_files_lie_beside_the_adapter(tmp_path, train, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert train("followed", "tensorboard") == train("alone")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    events = reader.EventAccumulator(str(tmp_path / "logs" / "followed"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 10, 20]
    assert not (tmp_path / "logs" / "alone").exists()


def written_records(data: bytes) -> list[bytes]:
    """The records of a file of LevelDB's log format, in blocks of 32 KiB, after W&B's header."""
    found, part, at = [], b"", 7
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # too little for a header: nought to the block's end
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
        at += 7 + length
    return found


def test_every_training_is_a_run_of_weights_and_biases(tmp_path, train, monkeypatch):
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("wandb.proto.wandb_internal_pb2")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train("first", "wandb") == train("second", "wandb") == train("alone")
    assert wandb.run is None and "WANDB_DIR" not in os.environ
    found = {}
    for file in (tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"):
        records = [Record.FromString(data) for data in written_records(file.read_bytes())]
        (name,) = {r.run.display_name for r in records if r.HasField("run")}
        lines = [
            {"/".join(i.nested_key) or i.key: i.value_json for i in r.history.item}
            for r in records
            if r.HasField("history")
        ]
        found[name] = [int(x["train/global_step"]) for x in lines if "train/loss" in x]
    assert found == {"first": [10, 20], "second": [10, 20]}


def test_every_training_is_a_run_of_mlflow(tmp_path, train, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert train("first", "mlflow") == train("second", "mlflow") == train("alone")
    assert mlflow.active_run() is None and "MLFLOW_TRACKING_URI" not in os.environ
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {r.info.run_name for r in runs} == {"first", "second"}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 10, 20]
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("ml")]


def test_unknown_trackers_are_named():
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(RecipeError, match="unknown tracker"):
        parse_recipe(RECIPE | {"training": {"report_to": "nowhere"}})


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("orthomerge.training.tracking.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install wandb"):
        check_trackers(["wandb"])


def test_trackers_change_no_key():
    pytest.importorskip("tensorboard")
    told = parse_recipe(RECIPE | {"training": {"report_to": "tensorboard"}})
    assert told.training.report_to == ["tensorboard"]
    for task in RECIPE["tasks"]:
        assert told.training.content(task) == parse_recipe(RECIPE).training.content(task)
