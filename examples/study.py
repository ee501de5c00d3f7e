"""A whole study in one file, on orthomerge's public API: copy it and change what you like.

It asks which start and constraint give adapters that merge well, and under which method. For each
arm and seed it starts and trains one adapter per task, merges them, and scores every task with its
own adapter ("single") and with each merge:

    pip install orthomerge
    python examples/study.py minilm subjectivity topic excerpt similarity --output study/

A task is a name of `orthomerge list tasks`, or a CSV, JSONL or Parquet file with the columns "text"
and "label". `orthomerge run` does such a study from a recipe: on several cores or machines, resumed
after a stop, with learning rates chosen per arm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

import orthomerge
from orthomerge import OsrmConfig, Statistics
from orthomerge.adapters import Adapter, read_adapter
from orthomerge.evaluation import Evaluator, Update
from orthomerge.merging import MergeConfig
from orthomerge.models import load_backbone, load_classifier, load_tokenizer, resolve_model
from orthomerge.statistics import batches, sample_texts
from orthomerge.tasks import Row, Task, get_task

# How an adapter starts, and what holds its training.
ARMS = {
    "default": OsrmConfig("default"),
    "osrm": OsrmConfig("min_eigen"),
    "penalty": OsrmConfig("default", constraint="penalty", strength=10),
    "contrastive-project": OsrmConfig("contrastive", constraint="project"),
}
MERGES = {
    "sum × 0.4": MergeConfig("task_arithmetic", weights=0.4),
    "sum × 1": MergeConfig("task_arithmetic", weights=1.0),
    "ties × 1": MergeConfig("ties", weights=1.0, options={"density": 0.2}),
}
TARGETS = ["query", "value"]
RANK = 8
MAX_LENGTH = 48
SAMPLES = 100  # unlabelled texts per task, for its statistics


def collect(backbone: Any, tokenizer: Any, rows: Sequence[Row]) -> Statistics:
    """A task's second moments, from a sample of its training texts; labels are not read."""
    texts = sample_texts([(row.text, row.pair) for row in rows], SAMPLES, seed=0)
    inputs = batches(texts, tokenizer, max_length=MAX_LENGTH)
    return orthomerge.collect_statistics(backbone, inputs, TARGETS)


def train(
    base: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    others: list[Statistics],
    own: Statistics,
    config: OsrmConfig,
    folder: Path,
) -> Adapter:
    """Start an adapter, train it under its constraint and write it to `folder`."""
    model = load_classifier(
        base.path_or_id, num_labels=task.outputs, regression=task.regression,
        seed=config.seed, name=base.name,
    )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders name none
    set_seed(config.seed)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="SEQ_CLS")
    peft_model = get_peft_model(model, lora)
    osrm = orthomerge.prepare(peft_model, others, own, config)
    encoded = Dataset.from_list(
        [{**tokenizer(row.text, row.pair, truncation=True, max_length=MAX_LENGTH),
          "labels": row.label} for row in rows]
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=6e-3,
        warmup_steps=0.06,  # a share of all steps
        seed=config.seed,
        save_strategy="no",
        report_to="none",
    )
    collator = DataCollatorWithPadding(tokenizer)
    Trainer(peft_model, arguments, collator, train_dataset=encoded, callbacks=[osrm]).train()
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    osrm.record(folder)
    return read_adapter(folder)


def study(
    base_id: str,
    names: Sequence[str],
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    rows: int = 300,
    test: int = 200,
) -> pd.DataFrame:
    """A line per arm, seed, task and merge, with the task's main score."""
    base = resolve_model(base_id)
    tokenizer = load_tokenizer(base.path_or_id)
    tasks = {task.name: task for task in map(get_task, names)}
    data = {name: task.data(train=rows, test=test) for name, task in tasks.items()}
    backbone = load_backbone(base.path_or_id)
    statistics = {name: collect(backbone, tokenizer, of.train) for name, of in data.items()}
    evaluator = Evaluator(base.path_or_id, tokenizer, max_length=MAX_LENGTH)
    found: list[dict[str, Any]] = []
    for seed, arm in product(seeds, ARMS):
        adapters: list[Adapter] = []
        for place, (name, task) in enumerate(tasks.items()):
            others = [of for other, of in statistics.items() if other != name]
            # Each adapter has a seed of its own: those that share one start from the same A.
            config = replace(ARMS[arm], seed=1000 * seed + place)
            folder = output / f"seed{seed}" / arm / name
            made = train(base, tokenizer, task, data[name].train, others, statistics[name], config,
                         folder)  # fmt: skip
            adapters.append(made)
        updates: dict[str, list[Update]] = {"single": [adapter.layers for adapter in adapters]}
        for label, merge in MERGES.items():
            merged = orthomerge.merge_adapters(adapters, merge)
            updates[label] = [merged.of(place) for place in range(len(adapters))]
        for label, by_task in updates.items():
            for task, adapter, update in zip(tasks.values(), adapters, by_task, strict=True):
                scores = evaluator.score(task, data[task.name].test, update, adapter.modules)
                found.append({"arm": arm, "seed": seed, "task": task.name, "merge": label,
                              "score": scores[task.metric]})  # fmt: skip
    return pd.DataFrame(found)


def table(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean score × 100 over tasks and seeds: a row per arm, a column per merge."""
    means = scores.pivot_table("score", "arm", "merge", sort=False)
    return (100 * means).round(1)


def main() -> None:
    """The study from the command line; the scores go to `scores.csv` in the output folder."""
    parser = argparse.ArgumentParser(description="Which start and constraint merge best?")
    parser.add_argument("base")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=300, help="training rows per task")
    parser.add_argument("--test", type=int, default=200, help="test rows per task")
    asked = parser.parse_args()
    scores = study(
        asked.base, asked.tasks, asked.output, seeds=asked.seeds, rows=asked.rows, test=asked.test
    )
    scores.to_csv(asked.output / "scores.csv", index=False)
    print(table(scores).to_string())


if __name__ == "__main__":
    main()
