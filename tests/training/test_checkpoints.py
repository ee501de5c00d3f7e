"""A training that was stopped goes on where it was, and comes to the same adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert
from tiny_text import LLAMA_TARGETS, tiny_language_tokenizer, tiny_llama

from orthomerge.adapters import new_lora, read_adapter, save_start
from orthomerge.errors import TrainingError, TrainingStopped
from orthomerge.models.loading import load_classifier
from orthomerge.tasks import Row, get_task, prompt_of
from orthomerge.training import TrainingSettings, train_adapter
from orthomerge.training import checkpoints as module

ROWS = [Row("good film", None, 1), Row("bad dull film", None, 0), Row("a king", None, 1)] * 16


@pytest.fixture
def start(tmp_path):
    wrapped = new_lora(
        tiny_bert(), targets=["query", "value"], rank=2, alpha=4, task_type="SEQ_CLS"
    )
    save_start(wrapped, tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def train(start, tiny_base, tiny_tokenizer, tmp_path):
    def run(name: str, *, rows=ROWS, rate=5e-3, **more) -> Path:
        return train_adapter(
            load_classifier(str(tiny_base), num_labels=2), start, rows, tiny_tokenizer,
            regression=False, output=tmp_path / name, **more,
            settings=TrainingSettings(learning_rate=rate, epochs=3, batch_size=8),
        )  # fmt: skip

    return run


def stop_after(steps: int):
    asked = iter([*[False] * (steps - 1), True])
    return lambda: next(asked)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adapter = read_adapter(folder)
    factors = {f"{n}.{m}": getattr(f, m) for n, f in adapter.layers.items() for m in "AB"}
    return factors | dict(adapter.modules)


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(tensor.equal(b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("steps", [1, 6, 7, 17])
def test_a_stopped_training_goes_on_to_the_same_adapter(train, tmp_path, steps):
    whole = train("whole")
    kept = tmp_path / "kept"
    with pytest.raises(TrainingStopped, match="call the same command again"):
        train("out", checkpoints=kept, stop=stop_after(steps))
    assert not (tmp_path / "out").exists()
    done = []
    out = train("out", checkpoints=kept, progress=lambda step, of: done.append(step))
    assert done[0] == steps + 1 and done[-1] == 18
    assert same(whole, out)
    assert not kept.exists()


def test_it_can_be_stopped_several_times(train, tmp_path):
    for _ in range(3):
        with pytest.raises(TrainingStopped):
            train("out", checkpoints=tmp_path / "kept", stop=stop_after(4))
    assert same(train("out", checkpoints=tmp_path / "kept"), train("whole"))


def test_what_fails_between_two_checkpoints_goes_on_from_the_older_one(
    train, tmp_path, monkeypatch
):
    clock = iter(float(2 * n) for n in range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module.Checkpoints.__init__, "__kwdefaults__", {"stop": None, "every": 5.0})

    def fail(step, of):
        if step == 14:
            raise RuntimeError("the power is off")

    with pytest.raises(RuntimeError):
        train("out", checkpoints=tmp_path / "kept", progress=fail)
    there = sorted((tmp_path / "kept").glob("checkpoint-*"))
    assert 1 <= len(there) <= 2 and all((path / module.WHOLE).is_file() for path in there)
    # One that was cut off while it was written is passed by.
    torn = tmp_path / "kept" / "checkpoint-15"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    steps = []
    out = train("out", checkpoints=tmp_path / "kept", progress=lambda step, of: steps.append(step))
    assert 1 < steps[0] < 14
    assert same(out, train("whole"))


def test_checkpoints_of_another_training_are_refused_and_kept(train, tmp_path):
    with pytest.raises(TrainingStopped):
        train("out", checkpoints=tmp_path / "kept", stop=stop_after(4))
    before = sorted(p.name for p in (tmp_path / "kept").rglob("*"))
    for change in ({"rate": 1e-3}, {"rows": ROWS[:-1]}, {"seed": 1}, {"constraint": "freeze"}):
        with pytest.raises(TrainingError, match="another training"):
            train("out", checkpoints=tmp_path / "kept", **change)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(TrainingError, match="another training"):
        train("out", checkpoints=tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "kept").rglob("*")) == before
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_the_record_tells_how_the_adapter_is_asked_and_what_a_constant_answer_loses(
    train, tmp_path
):
    record = json.loads((train("out") / "training.json").read_text())
    assert record["form"] == "classifier" and record["max_length"] == 48
    share = 2 / 3
    entropy = -(share * torch.tensor(share).log() + (1 - share) * torch.tensor(1 - share).log())
    assert record["constant_loss"] == pytest.approx(float(entropy))
    assert record["losses"][0][0] == 1 and record["losses"][-1][1] < record["losses"][0][1]


def test_in_words_too(tmp_path):
    tokenizer = tiny_language_tokenizer()
    vocabulary, prompt = len(tokenizer), prompt_of(get_task("sentiment"))
    wrapped = new_lora(
        tiny_llama(vocabulary), targets=LLAMA_TARGETS, rank=2, alpha=4, task_type="CAUSAL_LM"
    )
    save_start(wrapped, tmp_path / "start")

    def run(name, **more):
        return train_adapter(
            tiny_llama(vocabulary), tmp_path / "start", ROWS, tokenizer, regression=False,
            prompt=prompt, output=tmp_path / name, **more,
            settings=TrainingSettings(learning_rate=1e-2, epochs=3, batch_size=8),
        )  # fmt: skip

    whole = run("whole")
    with pytest.raises(TrainingStopped):
        run("out", checkpoints=tmp_path / "kept", stop=stop_after(5))
    assert same(whole, run("out", checkpoints=tmp_path / "kept"))
    record = json.loads((whole / "training.json").read_text())
    assert record["prompt"] == prompt.record() and record["form"] == "text"
    # Two answers, an end after each: the constant answer's loss is spread over their tokens.
    assert 0 < record["constant_loss"] < 0.7 / 2


def test_a_checkpoint_asks_no_hub_for_the_base(train, start, tmp_path, monkeypatch):
    config = json.loads((start / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "minilm"  # a packaged id: neither a folder nor the hub's
    (start / "adapter_config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *a: asked.append(a)
    )
    with pytest.raises(TrainingStopped):
        train("out", checkpoints=tmp_path / "kept", stop=stop_after(2))
    assert not asked and list((tmp_path / "kept").glob("checkpoint-*"))
