"""One adapter trained by two processes, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import call, tiny_bert, write_task

from orthomerge.adapters import new_lora, read_adapter, save_start

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_share_every_batch_and_one_writes(tiny_base, tmp_path, launcher):
    model = new_lora(tiny_bert(2), targets=["query", "value"], rank=2, alpha=4, task_type="SEQ_CLS")
    save_start(model, tmp_path / "start")
    task = write_task(tmp_path / "task.jsonl", 400)
    arguments = [
        "train", tmp_path / "start", "--task", task, "--base", tiny_base, "--rows", 160,
        "--epochs", 4, "--batch-size", 8, "--learning-rate", 5e-3, "--max-length", 16,
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
    # As many steps as one process takes: a batch is shared, not doubled.
    assert [s for s, _ in steps[0]] == [s for s, _ in steps[1]] and steps[0][-1][0] == 80
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    for name, factors in two.layers.items():
        assert factors.B.any() and torch.isfinite(factors.delta()).all()
        assert factors.A.shape == one.layers[name].A.shape
        # The order of rows differs between launches, where the updates end up does not.
        a, b = factors.delta().flatten(), one.layers[name].delta().flatten()
        assert float(torch.cosine_similarity(a, b, dim=0)) > 0.5
    assert not list(tmp_path.glob(".two*"))
