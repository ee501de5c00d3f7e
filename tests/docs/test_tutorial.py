"""The tutorial from its first block to its last: the files it writes, the scores it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blocks import blocks
from conftest import call
from world import run

TASKS = ("reviews", "tickets", "notes")


def carry_out(base: str | Path) -> None:
    """Every block in order; a block that begins with a file's name is that file."""
    for block in blocks("docs/tutorial.md"):
        if block.text.startswith("# ") and block.text.splitlines()[0].endswith((".py", ".yaml")):
            text = block.text.replace("base: minilm", f"base: {base}")
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        if not block.not_run:
            run(block, Path(base), {})


def accuracy(adapter: str, task: str, head: str | None = None) -> float:
    more = ["--head", head] if head else []
    found = json.loads(call("eval", adapter, "--task", f"{task}.csv", *more, "--json"))
    return found["metrics"]["accuracy"]


def test_the_tutorial_runs_from_start_to_end(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    carry_out(tiny_base)
    for name in ("merged/adapter_model.safetensors", "merged-tuned/merge.json",
                 "runs/mine/report.html", "start/notes/adapter_config.json"):  # fmt: skip
        assert Path(name).is_file(), name


@pytest.mark.slow
def test_the_tutorial_keeps_what_it_promises(tmp_path, monkeypatch):
    """On the real base: each adapter is good alone, and the sum of all three keeps it."""
    monkeypatch.chdir(tmp_path)
    carry_out("minilm")
    for task in TASKS:
        alone = accuracy(f"trained/{task}", task)
        assert alone >= 0.95
        assert accuracy("merged", task, f"merged/heads/{task}.safetensors") >= 0.9 * alone
