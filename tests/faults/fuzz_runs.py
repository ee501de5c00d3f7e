"""What the fuzzer does to the files of a run: rows, record, journal, analyses, and a search's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuzz_mutate import Left, json_bytes, mutated, nothing_but, scratched

from orthomerge.board.runs import list_runs
from orthomerge.experiment import packaged_recipes
from orthomerge.experiment.estimate import read_rates
from orthomerge.experiment.measured import Costs
from orthomerge.experiment.preview import throughput_of_run
from orthomerge.experiment.record import write_record
from orthomerge.experiment.steps.start import TRAINING, read_losses
from orthomerge.io.analyses import BandShares, Curve, Disturbance, EnergySpectrum, read_analyses
from orthomerge.io.files import append_lines
from orthomerge.io.rows import ResultRow, read_rows
from orthomerge.models.assets import ResolvedModel
from orthomerge.report import render_report, summarize
from orthomerge.report.trials import build_trials_page

PAGES = 0.2
"""The share of runs of which the whole page is made: it takes a hundred times as long."""


# What honest files of a run and of a search hold.
_PAIR = [[1.0, 0.5], [None, 1.0]]
EVIDENCE: list[Any] = [
    Disturbance("k", "a", 0, 0.1, "token", ["x", "y"], _PAIR, {"layer.0": _PAIR, "layer.1": _PAIR}),
    EnergySpectrum("k/l", "x", "layer.0", 6, [1, 2, 4], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1]),
    BandShares("p/l", "a", 0, "x", "layer.0", [0.5, 0.5], [0.9, 0.1], [1.0, 0.1]),
    Curve("c", "a", 0, "x", 0.1, [[1, 0.7], [2, 0.5]]),
]
SEARCH = {
    "format": 1, "objective": "validation", "score": 0.9, "weights": [1.0, 0.5],
    "layer_weights": {}, "method": {"name": "linear", "options": {}}, "best": 1,
    "tasks": [{"name": n, "metric": "accuracy", "score": 0.9, "rows": 5, "rows_sha256": "a"}
              for n in "xy"],
    "adapters": [{"name": n, "path": n, "sha256": "a"} for n in "xy"],
    "base_model": {"name": "tiny", "sha256": "a"}, "settings": {"low": 0.0, "high": 1.0},
    "labels": ["x", "y"], "versions": {"torch": "2"},
    "trials": [{"number": n, "weights": [1.0, n / 2], "value": 0.5 + n / 3, "tasks": [0.9, 0.8]}
               for n in range(2)],
}  # fmt: skip


def _honest_rows() -> list[dict[str, Any]]:
    return [
        json.loads(
            ResultRow(task, "a", "default", None, None, "init", 0.1, method, weight, "accuracy",
                      0.5, 0, 10, "test", f"{task}{method}").to_json()
        )
        for task in ("x", "y") for method, weight in (("single", None), ("linear", 1.0))
    ]  # fmt: skip


def rows(root: Path) -> Callable[[random.Random], None]:
    """Result rows, summed up."""
    root.mkdir()
    honest = _honest_rows()

    def once(rng: random.Random) -> None:
        _write_lines(root / "results.jsonl", mutated(honest, rng), rng)
        found = read_rows(root / "results.jsonl")
        if found:
            summarize(found)

    return once


def record(root: Path) -> Callable[[random.Random], None]:
    """`run.json`: looked at by the page, the board and the plan, then written over by a run."""
    run = _run_folder(root)
    honest: dict[str, Any] = {
        "name": "demo", "command": "orthomerge run r.yaml", "started": "2026-01-01T00:00:00+00:00",
        "recipe": packaged_recipes()["demo.yaml"].read_text(encoding="utf-8"), "expected_rows": 4,
        "seeds": {"seeds": [0]}, "arm_tasks": {"a": ["x", "y"]}, "version": "0.1.0",
        "versions": {"torch": "2.13.0"}, "machine": "x86_64",
        "base": {"id": "tiny", "source": "path", "sha256": "a" * 64},
        "tasks": [{"name": "x", "title": "X", "metric": "accuracy", "kind": "sentence",
                   "licence": "MIT", "source": "s", "made": "m"}],
        "known": [{"arm": "a", "score": 1.0}],
        "seconds": {"train": 1.5, "eval": 2.0}, "peak_memory": {"train": 10**9},
    }  # fmt: skip

    def once(rng: random.Random) -> None:
        (run / "run.json").write_bytes(json_bytes(honest, rng))
        list_runs(root)
        if rng.random() < PAGES / 5:
            render_report([run])
        base = ResolvedModel("tiny", "path", run, "a" * 64, "tiny")
        try:
            found = read_rates(run / "run.json")
            if "rates" not in found and rng.random() < PAGES / 5:
                throughput_of_run(found, "run.json")
        finally:
            write_record(run / "run.json", {"started": "now", "base": "tiny"}, base, [], Costs())
            json.loads((run / "run.json").read_text(encoding="utf-8"))

    return once


def journal(root: Path) -> Callable[[random.Random], None]:
    """`jobs.jsonl`, of any bytes: a line is added, and every whole line before it stays."""
    root.mkdir()
    lines = [
        {"time": "t", "event": e, "kind": "train", "job": f"{n}"} for n in range(3) for e in "ab"
    ]
    honest = "".join(json.dumps(line) + "\n" for line in lines).encode()

    def once(rng: random.Random) -> None:
        data = scratched(honest, rng)
        if rng.random() < 0.5:
            data = data.rstrip(b"\n") + json_bytes(lines[0], rng)
        (root / "jobs.jsonl").write_bytes(data)
        append_lines(root / "jobs.jsonl", ["{}"])
        found = (root / "jobs.jsonl").read_bytes()
        assert found.endswith(b"\n{}\n") or found == b"{}\n"
        assert found.startswith(data[: data.rfind(b"\n") + 1])

    return once


def analyses(root: Path) -> Callable[[random.Random], None]:
    """The files next to the rows, and an adapter's losses: read, and now and then the page made."""
    run = _run_folder(root)

    def once(rng: random.Random) -> None:
        broken = rng.randrange(5)
        for place, item in enumerate(EVIDENCE):
            lines = [asdict(item), {**asdict(item), "key": "second", "seed": 1}]
            changed = mutated(lines, rng) if place == broken else lines
            _write_lines(run / item.FILE, changed, rng if place == broken else None)
        if broken == 4:
            (run / TRAINING).write_bytes(json_bytes({"losses": [[1, 0.5], [2, 0.4]]}, rng))
            read_losses(run)
        elif rng.random() < PAGES:
            assert "</html>" in render_report([run])
        else:
            read_analyses(run)

    return once


def search(root: Path) -> Callable[[random.Random], None]:
    """The record of a search for weights: its page, which is there whole or not at all."""
    root.mkdir()

    def once(rng: random.Random) -> None:
        start = SEARCH | {"objective": rng.choice(["validation", "entropy"])}
        (root / "weights.json").write_bytes(json_bytes(start, rng))
        (root / "trials.html").unlink(missing_ok=True)
        try:
            build_trials_page(root)
        finally:
            nothing_but(root, {"weights.json", "trials.html"})
            page = root / "trials.html"
            if page.exists() and "</html>" not in page.read_text("utf-8"):
                raise Left("half a page")

    return once


def _run_folder(root: Path) -> Path:
    """A folder with one run in it, of two tasks alone and merged."""
    run = root / "run"
    run.mkdir(parents=True)
    _write_lines(run / "results.jsonl", _honest_rows(), None)
    return run


def _write_lines(path: Path, values: Any, rng: random.Random | None) -> None:
    """Lines of JSON; with an `rng`, now and then scratched."""
    values = values if isinstance(values, list) else [values]
    data = "\n".join(json.dumps(v) for v in values).encode() + b"\n"
    path.write_bytes(scratched(data, rng) if rng is not None and rng.random() < 0.3 else data)
