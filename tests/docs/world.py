"""The folder in which the documents' blocks run: every file they name, small, on a tiny base."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from blocks import SHELL, Block
from conftest import call, write_task
from diffusion_files import SDXL, kohya
from small_adapters import make_adapter

NAMED = ("a", "b", "c", "mine", "monday", "tuesday")
# Searches are cut short; every other word of a command is the page's.
SHORT = {"tune": ["--trials", "2"], "entropy": ["--steps", "2"]}
PYTHON = {'"q_proj"': '"query"', '"v_proj"': '"value"', '"CAUSAL_LM"': '"SEQ_CLS"'}


def build(folder: Path, base: Path) -> None:
    """Adapters a/ to c/, tables and statistics of each name, a start, a recipe of seconds."""
    for seed, name in enumerate(NAMED):
        write_task(folder / f"{name}.jsonl", 1200, seed=seed)
        as_csv(folder / f"{name}.jsonl")
        call("stats", base, "--data", folder / f"{name}.jsonl", "--samples", 20,
             "--output", folder / f"{name}.stats.safetensors")  # fmt: skip
    for seed, name in enumerate("abc"):
        make_adapter(folder / name, base, seed)
    call("init", base, "--others", folder / "b.stats.safetensors", "--own",
         folder / "mine.stats.safetensors", "--rank", 2, "--output", folder / "start")  # fmt: skip
    tasks = [write_task(folder / "topic.jsonl", 90, seed=1), write_task(folder / "one.jsonl", 90)]
    for seed, name in enumerate(("style", "subject")):
        kohya(folder / f"{name}.safetensors", SDXL, seed)
    (folder / "recipes").mkdir()
    (folder / "recipes" / "demo.yaml").write_text(yaml.safe_dump(recipe(tasks, base)))


def recipe(tasks: list[Path], base: Path) -> dict[str, Any]:
    """The demo's recipe in little: two tasks, two arms, one merge."""
    return {
        "name": "demo",
        "base": str(base),
        "tasks": [str(task) for task in tasks],
        "data": {"train": 24, "selection": 12, "test": 12, "max_length": 16},
        "adapter": {"rank": 2},
        "statistics": {"samples": 6},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3},
        "arms": {"default": {"start": "default"}, "osrm": {"start": "min_eigen"}},
        "merges": [{"method": "task_arithmetic", "weights": [0.5, 1.0]}],
    }


def as_csv(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def names(base: Path) -> dict[str, Any]:
    """What the pages' Python supposes that you have: a model, batches, an optimizer, a trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
    )

    from orthomerge import Statistics

    texts = [json.loads(line)["text"] for line in Path("mine.jsonl").read_text().splitlines()[:16]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(texts)]
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    peft_model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    arguments = TrainingArguments("trained", max_steps=2, report_to=[], use_cpu=True)
    arguments.per_device_train_batch_size = 1
    return {
        "base": AutoModelForSequenceClassification.from_pretrained(base),
        "model": AutoModelForSequenceClassification.from_pretrained(base),
        "peft_model": peft_model,
        "dataloader": [tokenizer(texts, padding=True, return_tensors="pt")],
        "other_stats": Statistics.load("b.stats.safetensors"),
        "optimizer": torch.optim.AdamW(p for p in peft_model.parameters() if p.requires_grad),
        "get_peft_model": get_peft_model,
        "LoraConfig": LoraConfig,
        "Trainer": Trainer,
        "arguments": arguments,
        "rows": rows,
    }


def run(block: Block, base: Path, namespace: dict[str, Any]) -> None:
    """Carry a block out, here, as a reader of the page would; what fails names the block."""
    if block.language in SHELL:
        for words in block.commands:
            assert words[0] == "orthomerge", f"{block}: {words[0]} is not run here: say why"
            call(*filled(words[1:], base))
    elif block.language == "python":
        text = block.text
        for theirs, ours in PYTHON.items():
            text = text.replace(theirs, ours)
        exec(compile(text, str(block), "exec"), namespace)


def filled(arguments: list[str], base: Path) -> list[str]:
    """The command with the tiny base for the page's, its output out of the way, searches cut."""
    known = {"minilm": str(base), "org/base": str(base), "org/name@main": "c/", "org/name": "c/"}
    found = [known.get(word, word) for word in arguments]
    if "--output" in found and Path(found[found.index("--output") + 1]).is_dir():
        shutil.rmtree(found[found.index("--output") + 1])
    if "entropy" in found:
        return found + SHORT["entropy"]
    if "validation" in found or found[0] == "tune":
        return found + SHORT["tune"]
    return found
