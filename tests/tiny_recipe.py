"""A recipe of seconds, with every kind of job and both kinds of choice in it."""

from __future__ import annotations

import dataclasses
import json

from conftest import write_task

from orthomerge.experiment import Run, parse_recipe
from orthomerge.io.rows import read_rows


def make_recipe(folder, base):
    folder.mkdir(exist_ok=True)
    tasks = [
        str(write_task(folder / "one.jsonl", seed=1)),
        str(write_task(folder / "length.jsonl", seed=3, regression=True)),
    ]
    return {
        "name": "tiny",
        "base": str(base),
        "tasks": tasks,
        "seeds": [0],
        "data": {"train": 24, "selection": 12, "test": 16, "max_length": 16},
        "adapter": {"rank": 4, "alpha": 8},
        "statistics": {"samples": 6},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3},
        "arms": {
            "default": {"start": "default"},
            "osrm": {"start": "min_eigen", "learning_rate": [1e-3, 5e-3]},
        },
        "merges": [
            {"method": "task_arithmetic", "weights": [0.5, 1.0]},
            {"method": "fisher", "choose_from": [0.3]},
        ],
        "resources": {kind: {"memory": "200MB"} for kind in ("stats", "train", "eval", "merge")}
        | {kind: {"memory": "100MB"} for kind in ("start", "fisher")},
    }


def execute(values, output, **how):
    return Run(parse_recipe(values), output, **how).execute()


def untimed(rows):
    """Rows, or the lines of a file of rows, without the one field that is a clock's."""
    rows = rows if isinstance(rows, list) else read_rows(rows)
    return [dataclasses.replace(row, seconds=None).to_json() for row in rows]


def journal(output):
    return [json.loads(line) for line in (output / "jobs.jsonl").read_text().splitlines()]


def check_journal(output):
    """No job was begun again once it was done; returns the ids of the jobs done, in order."""
    done = []
    for line in journal(output):
        assert line["job"] not in done, line
        if line["event"] == "done":
            done.append(line["job"])
    return done
