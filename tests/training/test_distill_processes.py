"""Processes that share every step, and a base in bfloat16, give what one in float32 gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import call, make_base, make_texts, make_tokenizer, tiny_bert
from small_adapters import make_adapter

from orthomerge import distill_adapters, verify
from orthomerge.adapters import read_adapter
from orthomerge.training import DistillSettings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, two adapters of it, and the words of the command that distills them."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "base").mkdir()
    base = make_base(folder / "base", make_tokenizer(folder))
    words = []
    for seed, name in enumerate("ab"):
        make_adapter(folder / name, base, seed + 1, size=1.5)
        rows = [json.dumps({"text": text}) for text in make_texts(40, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        words += ["--data", str(folder / f"{name}.jsonl")]
    named = [str(folder / "a"), str(folder / "b"), *words, "--rank", "3", "--learning-rate", "5e-3"]
    return folder, ["distill", *named, "--steps", "6", "--quiet"]


def test_two_processes_share_every_step(world, tmp_path):
    folder, words = world
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "orthomerge", *words, "--output", str(tmp_path / "two"),
        ],
        env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 adapters in one") == 1
    call(*words, "--output", tmp_path / "one")
    assert all(check.good for check in verify(tmp_path / "two"))
    one, two = (read_adapter(tmp_path / name).layers for name in ("one", "two"))
    moved = 0.0
    start = distill_adapters(
        [folder / "a", folder / "b"], [folder / "a.jsonl", folder / "b.jsonl"], rank=3,
        settings=DistillSettings(steps=0),
    )  # fmt: skip
    for name in one:
        torch.testing.assert_close(two[name].delta(), one[name].delta(), rtol=1e-3, atol=1e-5)
        moved += float((one[name].delta() - start.merged.dense(name)).norm())
    assert moved > 0.1
    records = [json.loads((tmp_path / n / "merge.json").read_text()) for n in ("one", "two")]
    near = [r["distilled"]["measured"][-1]["distance"] for r in records]
    assert near[0] == pytest.approx(near[1], rel=1e-3)
    assert not (tmp_path / "two.distill").exists()


def test_small_steps_are_not_rounded_into_a_base_in_bfloat16(world, tmp_path):
    folder, _ = world
    (tmp_path / "half").mkdir()
    half = make_base(tmp_path / "half", make_tokenizer(tmp_path))
    tiny_bert().bert.to(torch.bfloat16).save_pretrained(half)
    settings = DistillSettings(steps=30, learning_rate=1e-3)
    parts = [
        make_adapter(tmp_path / name, half, seed + 1, size=1.5) for seed, name in enumerate("ab")
    ]
    texts = [folder / "a.jsonl", folder / "b.jsonl"]
    done = distill_adapters(parts, texts, rank=3, settings=settings, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["distilled"]["teachers"]["type"] == "bfloat16"
    full = distill_adapters([folder / "a", folder / "b"], texts, rank=3, settings=settings)
    gained = [m[0].distance - m[-1].distance for m in (done.measured, full.measured)]
    assert full.scale == done.scale and gained[0] == pytest.approx(gained[1], rel=0.1)
    assert {f.A.dtype for f in done.factors.values()} == {torch.float32}
