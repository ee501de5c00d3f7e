"""TRL's SFTTrainer with our start and our constraint; the example script as a user runs it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import call
from datasets import load_dataset
from peft import PeftModel
from tiny_lora import dominant, lay_out, rows_of_A, wrapped, write_rows
from transformers import Trainer, TrainerCallback, TrainingArguments

import orthomerge
from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.models.loading import load_language_model, load_tokenizer

trl = pytest.importorskip("trl")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "trl_sft.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("trl"))


class Watch(TrainerCallback):
    """`A` as the trainer has it before its first step, and after each."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self.seen.append(rows_of_A(model))

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.seen.append(rows_of_A(model))


def train(kind, model, base, folder, callbacks, **settings):
    """A few steps by SFTTrainer or the plain Trainer, at a rate that moves everything."""
    tokenizer = load_tokenizer(str(base))
    rows = load_dataset("json", data_files=str(write_rows(folder / "rows.jsonl")), split="train")
    common = {
        "output_dir": str(folder / "run"), "max_steps": 6, "learning_rate": 2e-2,
        "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, **settings,
    }  # fmt: skip
    if kind == "sft":
        trainer = trl.SFTTrainer(
            model=model, args=trl.SFTConfig(**common), train_dataset=rows,
            processing_class=tokenizer, callbacks=callbacks,
        )  # fmt: skip
    else:
        encoded = rows.map(
            lambda row: {**(ids := tokenizer(row["text"])), "labels": ids["input_ids"]},
            remove_columns=["text"],
        )
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**{**common, "per_device_train_batch_size": 1}),
            train_dataset=encoded,
            callbacks=callbacks,
        )
    trainer.train()
    return trainer


CONFIGS = {
    "freeze": orthomerge.OsrmConfig(constraint="freeze"),
    "project": orthomerge.OsrmConfig(constraint="project"),
    "init": orthomerge.OsrmConfig(),
}


@pytest.mark.parametrize("kind", ["sft", "trainer"])
@pytest.mark.parametrize("constraint", list(CONFIGS))
def test_the_start_survives_the_trainer_and_the_constraint_its_steps(
    place, tmp_path, kind, constraint
):
    base, others = place
    model, config, watch = wrapped(base), CONFIGS[constraint], Watch()
    chosen = orthomerge.initialize_osrm_weights(model, others, config=config)
    holds = orthomerge.OsrmCallback(model, others, config=config)
    train(kind, model, base, tmp_path, [holds, watch])
    first, *steps = watch.seen
    assert len(steps) == 6
    assert set(first) == set(chosen)
    assert all(A.dtype == torch.float32 for A in first.values())
    for name, A in first.items():  # neither drawn anew nor cast; a projection more rounds
        gap = 1e-6 if constraint == "project" else 0
        torch.testing.assert_close(A, chosen[name].basis.float(), atol=gap, rtol=0)
    moved = [float((steps[-1][n] - first[n]).norm()) for n in first]
    excluded = dominant(others)
    inside = [max(float((s[n].double() @ excluded[n]).norm()) for n in s) for s in steps]
    if constraint == "freeze":
        assert all(torch.equal(s[n], first[n]) for s in steps for n in first)
    else:
        assert min(moved) > 1e-2  # it does learn
    if constraint == "init":  # the control: the training goes there if it is let
        assert max(inside) > 1e-2
    else:
        assert max(inside) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_base_keeps_a_start_in_full_precision(place, tmp_path, dtype):
    """PEFT holds adapters in float32 above a bfloat16 base, and SFTTrainer leaves them there."""
    base, others = place
    model, watch = wrapped(base, dtype=dtype), Watch()
    config = CONFIGS["project"]
    chosen = orthomerge.initialize_osrm_weights(model, others, config=config)
    holds = orthomerge.OsrmCallback(model, others, config=config)
    train("sft", model, base, tmp_path, [holds, watch], bf16=dtype == torch.bfloat16, max_steps=2)
    for name, A in watch.seen[0].items():
        assert A.dtype == torch.float32
        torch.testing.assert_close(A, chosen[name].basis.float(), atol=1e-6, rtol=0)
    excluded = dominant(others)
    assert max(float((A.double() @ excluded[n]).norm()) for n, A in watch.seen[-1].items()) < 1e-6
    assert next(model.base_model.model.model.embed_tokens.parameters()).dtype == dtype


@pytest.mark.parametrize("kind", ["sft", "trainer"])
def test_the_penalty_holds_down_what_the_others_get(place, tmp_path, kind):
    base, others = place
    disturbed = {}
    for strength in (0.0, 1e3):
        model = wrapped(base)
        config = orthomerge.OsrmConfig("default", constraint="penalty", strength=strength)
        osrm = orthomerge.prepare(model, others, config=config)
        trainer = train(kind, model, base, tmp_path, [osrm], save_strategy="steps", save_steps=3)
        assert osrm.penalty is not None
        disturbed[strength] = float(osrm.penalty.value)
        folder = tmp_path / "saved"
        trainer.save_model(str(folder))
        osrm.record(folder)
        for where in (folder, tmp_path / "run" / "checkpoint-3"):
            found = json.loads((where / "training.json").read_text())
            assert (found["constraint"], found["strength"]) == ("penalty", strength)
    assert disturbed[1e3] < 0.3 * disturbed[0.0]


def test_one_call_starts_and_holds(place, tmp_path):
    base, others = place
    for constraint in CONFIGS:
        model, twice = wrapped(base), wrapped(base)
        osrm = orthomerge.prepare(model, others, config=CONFIGS[constraint])
        orthomerge.initialize_osrm_weights(twice, others, config=CONFIGS[constraint])
        orthomerge.OsrmCallback(twice, others, config=CONFIGS[constraint])
        assert osrm.started is not None
        assert osrm.started.config == CONFIGS[constraint]
        for name, A in rows_of_A(model).items():
            assert torch.equal(A, rows_of_A(twice)[name])


def test_a_trainer_that_wraps_the_model_anew_is_refused_before_it_trains(place, tmp_path):
    base, others = place
    held = wrapped(base)
    callback = orthomerge.OsrmCallback(held, others, config=CONFIGS["project"])
    with pytest.raises(AdapterError, match="another model than the callback holds"):
        train("sft", wrapped(base), base, tmp_path, [callback])


def test_a_constraint_without_others_is_refused_in_one_sentence(place):
    base, _ = place
    with pytest.raises(StatisticsError, match="at least one other"):
        orthomerge.OsrmCallback(wrapped(base), [], config=CONFIGS["project"])
    with pytest.raises(StatisticsError, match=r"nowhere\.stats"):
        orthomerge.OsrmCallback(wrapped(base), ["nowhere.stats.safetensors"], own="no")


@pytest.mark.parametrize(
    "words, constraint", [("text", "project"), ("prompt", "freeze"), ("text", "penalty")]
)
def test_the_example_script_gives_adapters_that_merge(
    place, tmp_path, monkeypatch, words, constraint
):
    """Twice as a user runs it, the second team on the first one's statistics; then merged."""
    base, others = place
    for name, seed, theirs in (("a", 0, others), ("b", 1, ["a/mine.stats.safetensors"])):
        monkeypatch.chdir(tmp_path)
        rows = write_rows(tmp_path / f"{name}.jsonl", 24, seed, words)
        arguments = [str(base), "--data", str(rows), "--others", *theirs, "--output", name,
                     "--constraint", constraint, "--rank", "4", "--steps", "3", "--samples", "4",
                     "--learning-rate", "0.02"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        adapter, excluded = read_adapter(name), dominant(theirs)
        assert len(adapter.layers) == 4
        found = json.loads((Path(name) / "training.json").read_text())
        assert found["constraint"] == constraint
        for layer, factors in adapter.layers.items():
            assert float(factors.B.norm()) > 1e-3
            A = factors.A.double()
            if constraint == "project":
                assert float((A @ excluded[layer.removeprefix("model.")]).norm()) < 1e-6
            if constraint == "freeze":
                assert torch.allclose(A @ A.T, torch.eye(4).double(), atol=1e-5)
    # Its statistics are for others' starts, as those of 'orthomerge stats --form text' are.
    call("init", base, "--others", "a/mine.stats.safetensors", "--rank", 2, "--output", "start")
    assert read_adapter("start").config["task_type"] == "CAUSAL_LM"
    call("merge", "a", "b", "--output", "merged", "--base", base)
    merged = PeftModel.from_pretrained(load_language_model(str(base)), "merged")
    alone = [read_adapter(n).layers for n in "ab"]
    for name, module in merged.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer = name.removeprefix("base_model.model.")
            expected = sum(a[layer].delta() for a in alone)
            torch.testing.assert_close(
                module.get_delta_weight("default").detach(), expected, atol=1e-6, rtol=1e-5
            )
