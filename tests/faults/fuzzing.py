"""Broken files by the thousand, in process: only `OrthomergeError` may come out, and no half file.

python tests/faults/fuzzing.py --inputs 100000    # writes results/fuzz.json and docs/trust.md
python tests/faults/fuzzing.py --only json        # those targets; the rest of the table stays

A seeded mutator of our own: an honest value is taken, values of it are replaced by nasty ones (or
left out, renamed, repeated), and every few times bytes of the file are flipped, cut or doubled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fuzz_adapters
import fuzz_files
import fuzz_gentle
import fuzz_records
import fuzz_runs
import torch
from fuzz_mutate import Left, Target

from orthomerge.errors import OrthomergeError

RESULT = Path(__file__).parent / "results" / "fuzz.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "trust.md"
MARK, END = "<!-- written by make fuzz -->", "<!-- end -->"
LIMIT_S, MEMORY = 5, 16 * 2**30
TARGETS = 19
_COUNTS = {
    "inputs": "inputs", "accepted": "accepted", "refused": "refused", "uncaught": "uncaught",
    "half": "half outputs", "hangs": "hangs",
}  # fmt: skip


class Hang(BaseException):
    """An input took too long; none of the handlers for errors may take it for one of theirs."""


def targets(root: Path) -> list[Target]:
    """All kinds, with honest files under `root`."""
    return [
        Target("adapter_config.json", 0.08, fuzz_adapters.adapter_config(root / "config")),
        Target("adapter_model.safetensors", 0.06, fuzz_adapters.adapter_weights(root / "weights")),
        Target("statistics files", 0.08, fuzz_files.statistics(root / "stats")),
        Target("recipes", 0.08, fuzz_files.recipe(root / "recipe")),
        Target("weights and options", 0.06, fuzz_adapters.options()),
        Target("merge.json", 0.06, fuzz_records.merge_record(root / "record")),
        Target("convert.json", 0.05, fuzz_records.convert_record(root / "converted")),
        Target("start.json", 0.05, fuzz_records.start_of(root / "start")),
        Target("results.jsonl", 0.06, fuzz_runs.rows(root / "rows")),
        Target("adapters, odd but whole", 0.08, fuzz_gentle.odd_weights(root / "odd")),
        Target("options at their ends", 0.08, fuzz_gentle.option_ranges()),
        Target("values of factors", 0.06, fuzz_adapters.values()),
        Target("Fisher files", 0.04, fuzz_files.fisher(root / "fisher")),
        Target("kept_out.safetensors", 0.04, fuzz_files.kept_out(root / "kept_out")),
        Target("shard indexes and shards", 0.03, fuzz_adapters.shards(root / "shards")),
        Target("run.json", 0.03, fuzz_runs.record(root / "run")),
        Target("jobs.jsonl", 0.02, fuzz_runs.journal(root / "journal")),
        Target("evidence of a run", 0.03, fuzz_runs.analyses(root / "evidence")),
        Target("weights.json of a search", 0.01, fuzz_runs.search(root / "search")),
    ]


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Memory is bounded while it runs, and no input takes more than its time."""

    def late(*_: Any) -> None:
        raise Hang(f"more than {LIMIT_S} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    handlers = {s: signal.signal(s, late) for s in (signal.SIGPROF, signal.SIGALRM)}
    try:
        yield
    finally:
        _give(0, 0)
        for s, handler in handlers.items():
            signal.signal(s, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _give(own: float, wall: float) -> None:
    """So many seconds of the process's own time, and so many by the clock, for what only waits."""
    signal.setitimer(signal.ITIMER_PROF, own)
    signal.setitimer(signal.ITIMER_REAL, wall)


def fuzz(
    target: Target, inputs: int, seed: int = 0, seconds: float = float("inf")
) -> dict[str, Any]:
    """How many inputs were accepted, refused in a sentence, or came out as anything else."""
    found: dict[str, Any] = {"target": target.name, "inputs": 0, "accepted": 0, "refused": 0,
                             "hangs": 0, "half": 0}  # fmt: skip
    uncaught: dict[str, int] = {}
    slowest, end = 0.0, time.monotonic() + seconds
    with _bounded():
        for number in range(inputs):
            if time.monotonic() > end:
                break
            found["inputs"] += 1
            _give(LIMIT_S, 12 * LIMIT_S)
            clock = time.thread_time()
            try:
                target.once(random.Random(f"{seed} {target.name} {number}"))
                found["accepted"] += 1
            except OrthomergeError:
                found["refused"] += 1
            except (Exception, Hang) as problem:
                found["hangs"] += isinstance(problem, Hang)
                found["half"] += isinstance(problem, Left)
                uncaught.setdefault(f"{type(problem).__name__}: {str(problem)[:100]}", number)
            slowest = max(slowest, time.thread_time() - clock)
    return {**found, "uncaught": found["inputs"] - found["accepted"] - found["refused"],
            "slowest_s": round(slowest, 3), "problems": uncaught}  # fmt: skip


def _one(place: int, inputs: int, seed: int, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as at:
        target = targets(Path(at))[place]
        found = fuzz(target, round(inputs * target.share), seed, seconds)
    found |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "seed": seed}
    print(found, flush=True)
    return found


def page() -> str:
    """The table of docs/trust.md, from the result file alone."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    heads = ("target", *_COUNTS.values(), "slowest, s")
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    total = dict.fromkeys(_COUNTS, 0)
    for row in result["targets"]:
        total = {key: value + row.get(key, 0) for key, value in total.items()}
        lines.append(_line(f"`{row['target']}`", row, row["slowest_s"]))
    lines.append(_line("all", total, max(row["slowest_s"] for row in result["targets"])))
    return "\n".join(lines)


def _line(name: str, row: dict[str, int], slowest: float) -> str:
    numbers = " | ".join(f"{row.get(k, 0):,}" for k in _COUNTS)
    return f"| {name} | {numbers} | {slowest:.3f} |"


def write_page() -> None:
    """Put the table into docs/trust.md, between its two marks."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARK + "\n", 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(f"{before}{MARK}\n{page()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes next to each other")
    parser.add_argument("--only", default="", help="targets by an expression; others stay as told")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, a target")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as at:
        names = [target.name for target in targets(Path(at))]
    told = {row["target"]: row for row in json.loads(RESULT.read_text())["targets"]}
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_one, place, asked.inputs, asked.seed, asked.seconds)
            for place, name in enumerate(names)
            if re.search(asked.only, name)
        ]
        found = {job.result()["target"]: job.result() for job in jobs}
    rows = [{**told, **found}[name] for name in names if name in {**told, **found}]
    RESULT.write_text(json.dumps({"targets": rows}, indent=2) + "\n")
    write_page()


if __name__ == "__main__":
    main()
