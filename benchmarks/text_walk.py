"""docs/text-to-text.md on a real decoder, command by command: `python -m benchmarks.text_walk`.

Two small tables are made of the offline corpora (plot or review; fear, knowledge or clothing), then
each command of the page is called on SmolLM2. What the commands print, and the seconds they took,
are lines of `results/smollm2-walk/results.jsonl`; the page's table is written from them. Called
again, it goes on with what is missing. About a quarter of an hour on two free cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orthomerge.io.files import append_lines
from orthomerge.report.written import markdown_grid
from orthomerge.tasks import get_task

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "results" / "smollm2-walk" / "results.jsonl"
PAGE = ROOT / "docs" / "text-to-text.md"
BEGIN, END = "<!-- walk -->\n", "<!-- walk: end -->"
BASE = "smollm2-135m"
# Offline task, its labels that are used, the most words of a text.
TABLES = {
    "reviews": ("subjectivity", ("plot", "review"), 20),
    "words": ("topic", ("fear", "knowledge", "clothing"), 20),
}
TRAIN, TEST = 80, 40
BY_LAYER = ("layers", "representations", "ranks")
"""What a command prints for each layer: too long to be kept."""


def write_tables(folder: Path) -> None:
    """`NAME.jsonl` and `NAME-test.jsonl`: the first fitting rows of the task's two pools."""
    for name, (source, labels, words) in TABLES.items():
        task = get_task(source)
        data = task.data(train=None, selection=1, test=None, seed=0)
        for suffix, rows, wanted in (("", data.train, TRAIN), ("-test", data.test, TEST)):
            fitting = [
                {"text": row.text, "label": task.labels[int(row.label)]}
                for row in rows
                if len(row.text.split()) <= words and task.labels[int(row.label)] in labels
            ]
            lines = "".join(json.dumps(row) + "\n" for row in fitting[:wanted])
            (folder / f"{name}{suffix}.jsonl").write_text(lines)


def steps(training: list[str]) -> list[tuple[str, str]]:
    """What each command is called in the rows, and the command."""
    (a, b), found = TABLES, []
    both = f"--stats {a}.stats.safetensors --stats {b}.stats.safetensors"
    for name in TABLES:
        found.append((f"stats {name}", f"stats {BASE} --form text --data {name}.jsonl "
                      f"--output {name}.stats.safetensors"))  # fmt: skip
    for name, other in ((a, b), (b, a)):
        found += [
            (f"init {name}", f"init {BASE} --others {other}.stats.safetensors "
             f"--own {name}.stats.safetensors --output start-{name}"),
            (f"train {name}", f"train start-{name} --train-file {name}.jsonl "
             f"{' '.join(training)} --output {name}"),
        ]  # fmt: skip
    found += [
        ("merge linear", f"merge {a} {b} --method linear --output linear"),
        ("merge regmean", f"merge {a} {b} --method regmean {both} --output regmean"),
    ]
    for name in TABLES:
        for model in (name, "linear", "regmean"):
            found.append((f"eval {model} on {name}", f"eval {model} --test-file {name}-test.jsonl"))
        found.append((f"eval base on {name}", f"eval {BASE} --test-file {name}-test.jsonl "
                      "--form text"))  # fmt: skip
    return [*found, ("diagnose", f"diagnose {a} {b} {both}")]


def call(command: str, folder: Path) -> dict[str, Any]:
    """One command in the folder: what it prints with `--json`, and its seconds."""
    began = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-m", "orthomerge", *command.split(), "--json"],
        cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    said = {k: v for k, v in json.loads(found.stdout).items() if k not in BY_LAYER}
    return {"seconds": round(time.perf_counter() - began, 1), "found": said}


def table(rows: Path = ROWS) -> str:
    """The scores of the page: every model on the test rows of both tables."""
    found = {r["step"]: r["found"] for r in map(json.loads, rows.read_text().splitlines())}
    grid = [["", *(f"{name}, accuracy of {TEST} rows" for name in TABLES)]]

    def line(said: str, model: str, read: Callable[[dict[str, Any]], float]) -> None:
        evals = [found[f"eval {model or name} on {name}"] for name in TABLES]
        grid.append([said, *(f"{read(of):.3f}" for of in evals)])

    line("a constant answer", "base", lambda of: of["majority"]["accuracy"])
    for said, model in (
        ("the base", "base"), ("each its own adapter", ""), ("merged by `linear`", "linear"),
        ("merged by `regmean`", "regmean"),
    ):  # fmt: skip
        line(said, model, lambda of: of["metrics"]["accuracy"])
    losses = [
        f"{name} {of['first']:.2f} → {of['last']:.2f} (a constant answer: {of['constant']:.2f})"
        for name in TABLES
        if (of := found[f"train {name}"]["loss"])
    ]
    return f"{markdown_grid(grid)}\n\nLosses: {'; '.join(losses)}.\n"


def page(text: str, rows: Path = ROWS) -> str:
    """The page with its table."""
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + table(rows) + END + rest.split(END, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where tables, adapters and merges go")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--train", default="--batch-size 4", help="more options of 'train'")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    write_tables(options.folder)
    done = set[str]()
    if options.rows.exists():
        done = {json.loads(line)["step"] for line in options.rows.read_text().splitlines()}
    for step, command in steps(options.train.split()):
        if step not in done:
            print(f"orthomerge {command}", flush=True)
            row = {"step": step, "command": command, **call(command, options.folder)}
            append_lines(options.rows, [json.dumps(row)])
    if options.rows == ROWS:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
