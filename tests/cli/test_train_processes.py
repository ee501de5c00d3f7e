"""One adapter trained by two processes, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import call, make_texts, tiny_bert, write_task

from orthomerge.adapters import new_lora, read_adapter, save_start

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


def apart(one, other):
    """How far two updates are from each other, relative to the second."""
    return float((one.delta() - other.delta()).norm() / other.delta().norm())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_share_every_batch_and_one_writes(tiny_base, tmp_path, launcher):
    model = new_lora(tiny_bert(2), targets=["query", "value"], rank=2, alpha=4, task_type="SEQ_CLS")
    save_start(model, tmp_path / "start")
    task = write_task(tmp_path / "task.jsonl", 200)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    # Every batch is all the rows, so their order does not matter: both ways compute the same.
    arguments = [
        "train", tmp_path / "start", "--task", task, "--base", base, "--rows", 64,
        "--epochs", 20, "--batch-size", 64, "--learning-rate", 5e-3, "--max-length", 16,
    ]  # fmt: skip
    call(*arguments, "--output", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "-m" if launcher == "torchrun" else "--module",
         "orthomerge", *map(str, arguments), "--output", str(tmp_path / "two"), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["path"] == str(tmp_path / "two")  # said once
    steps = [
        json.loads((tmp_path / n / "training.json").read_text())["losses"] for n in ("one", "two")
    ]
    # As many steps as one process takes: a batch is shared, not doubled and not repeated.
    assert [s for s, _ in steps[0]] == [s for s, _ in steps[1]] == [10, 20]
    halves = [64 // 2 if a == 64 else a for a in arguments]
    call(*halves, "--output", tmp_path / "half")
    one, two, half = (read_adapter(tmp_path / name) for name in ("one", "two", "half"))
    for name, factors in two.layers.items():
        assert factors.A.shape == one.layers[name].A.shape
        assert factors.B.any() and torch.isfinite(factors.delta()).all()
    # AdamW makes whole steps of roundings, so the two ways agree not to the last digit; what a
    # process would have learned from its half alone is clearly elsewhere.
    shared = [apart(two.layers[name], one.layers[name]) for name in one.layers]
    alone = [apart(half.layers[name], one.layers[name]) for name in one.layers]
    assert max(shared) < 0.1, (shared, alone)
    assert 2 * sum(shared) < sum(alone), (shared, alone)
    assert not list(tmp_path.glob(".two*"))


CUT_ON_CPU = Path(__file__).with_name("cut_on_cpu.py")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.mark.slow
def test_fsdp_cuts_the_model_and_writes_the_same_adapter(tiny_base, tmp_path):
    model = new_lora(tiny_bert(2), targets=["query", "value"], rank=2, alpha=4, task_type="SEQ_CLS")
    save_start(model, tmp_path / "start")
    task = write_task(tmp_path / "task.jsonl", 100)
    arguments = [
        "train", tmp_path / "start", "--task", task, "--base", tiny_base, "--rows", 32,
        "--epochs", 5, "--batch-size", 32, "--learning-rate", 5e-3, "--max-length", 16,
    ]  # fmt: skip

    def two(output, *more, **environment):
        return subprocess.run(
            [sys.executable, "-m", *LAUNCHERS["torchrun"], CUT_ON_CPU,
             *map(str, [*arguments, *more]), "--output", str(tmp_path / output)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip

    for output, environment in (("whole", {}), ("cut", FSDP)):
        done = two(output, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, cut = (read_adapter(tmp_path / name) for name in ("whole", "cut"))
    assert set(cut.modules) == set(whole.modules) != set()
    for name, factors in whole.layers.items():
        assert factors.B.any()
        assert apart(cut.layers[name], factors) < 1e-3
    for name, module in whole.modules.items():
        assert torch.allclose(cut.modules[name], module, atol=1e-5)

    for constraint in ("project", "penalty"):
        done = two(constraint, "--constraint", constraint, **FSDP)
        assert done.returncode != 0 and "Traceback" not in done.stdout
        assert not (tmp_path / constraint).exists()


@pytest.mark.slow
def test_two_processes_charge_what_one_charges(tiny_base, tiny_tokenizer, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in make_texts(9)))
    call(
        "stats", base, "--data", tmp_path / "b.jsonl", "--output", tmp_path / "b.stats.safetensors"
    )
    call("init", base, "--others", tmp_path / "b.stats.safetensors", "--rank", 2, "--constraint",
         "penalty", "--strength", 50, "--output", tmp_path / "start")  # fmt: skip
    task = write_task(tmp_path / "task.jsonl", 200)
    arguments = [
        "train", tmp_path / "start", "--task", task, "--rows", 64, "--epochs", 10, "--batch-size",
        64, "--learning-rate", 5e-3, "--max-length", 16,
    ]  # fmt: skip
    call(*arguments, "--output", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS["torchrun"], "-m", "orthomerge", *map(str, arguments),
         "--output", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / n / "training.json").read_text()) for n in ("one", "two")]
    one, two = (dict(t["penalties"]) for t in told)
    assert list(one) == [10]
    assert two == pytest.approx(one, rel=0.02)
    adapters = [read_adapter(tmp_path / n).layers for n in ("one", "two")]
    assert max(apart(adapters[1][name], f) for name, f in adapters[0].items()) < 0.1
