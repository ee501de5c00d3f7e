"""Faults in a whole run: one after another, each in a process of its own, until so many were done.

    python tests/faults/campaign.py FOLDER --faults 200 --seed 0

Every process is forked from this one, which has the libraries loaded. A run goes on from sitting
to sitting, a fault in each, until it is finished; then a new one begins. After every sitting the
folder is compared with that of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch

torch.set_num_threads(1)
import folder as stands
import kinds
from conftest import make_base, make_tokenizer
from injection import disk, watch
from sitting import Outcome, forked
from tiny_recipe import make_recipe, untimed

from orthomerge.experiment import Run, parse_recipe

# Kinds of faults with their share of all.
SHARES = {
    "SIGKILL before an operation on the disk": 26,
    "SIGKILL at a moment": 8,
    "SIGTERM before an operation on the disk": 8,
    "full disk (ENOSPC), from an operation on": 12,
    "quota used up (EDQUOT), from an operation on": 3,
    "failing disk (EIO), once": 8,
    "disk turned read-only (EROFS), from an operation on": 4,
    "file size limit (RLIMIT_FSIZE)": 5,
    "a really full disk (tmpfs)": 5,
    "read-only folder": 3,
    "a file cut short between two sittings": 10,
    "a file lost between two sittings": 4,
    "a second run in the folder": 2,
    "a clock that jumps, then SIGKILL": 4,
}


def schedule(count: int, seed: int) -> list[str]:
    """So many kinds, each about its share, in a drawn order."""
    names = list(SHARES)
    if count < 2 * len(names):
        drawn = names[:count]
    else:
        whole = [n for n in names for _ in range(SHARES[n])]
        drawn = [whole[i * len(whole) // count] for i in range(count)]
    random.Random(seed).shuffle(drawn)
    return drawn


class Campaign:
    def __init__(self, top: Path, base: Path, seed: int) -> None:
        self.top, self.draw = top, random.Random(seed)
        self.recipe = make_recipe(top / "tasks", base)
        self.found: dict[str, Counter] = {}
        self.failures: list[str] = []
        self.skipped: dict[str, str] = {}
        self.runs = self.sittings = 0
        self._plain()
        self._begin()

    def _plain(self) -> None:
        """The run that nothing happens to, its operations on the disk counted, and its seconds."""
        began = time.perf_counter()
        self.plain = self.top / "plain"
        disk.arm(self.plain, 0, None)
        Run(parse_recipe(self.recipe), self.plain).execute()
        self.operations, self.seconds = disk.count, time.perf_counter() - began
        disk.root = ""
        self.rows = untimed(self.plain / "results.jsonl")

    def _begin(self) -> None:
        self.runs += 1
        self.folder = self.top / f"run{self.runs}"
        self.state = stands.Stands(self.rows)

    def inject(self, kind: str) -> None:
        """One fault of a kind; where a run was finished before it, the next run has it."""
        tally = self.found.setdefault(kind, Counter())
        for _ in range(8):
            fault = kinds.KINDS[kind](self)
            if isinstance(fault, str):
                self.skipped[kind] = fault
                return
            outcome = fault.happen()
            self.sittings += 1
            self._look(kind, tally, outcome, damaged=fault.damaged)
            if outcome.code == 0:
                self._finish(kind, tally)
            if outcome.fired:
                tally["injected"] += 1
                tally[_ended(outcome)] += 1
                return
        self.failures.append(f"{kind}: could not be injected in eight sittings")

    def _look(self, kind: str, tally: Counter, outcome: Outcome, *, damaged: bool) -> None:
        problems = self.state.look(self.folder, damaged=damaged)
        if outcome.code == 1:
            problems["broke"].append(outcome.said[-1500:])
        if outcome.code == 2 and ("\n" in outcome.said or "'" not in outcome.said):
            problems["not one sentence"].append(outcome.said)
        for what, items in problems.items():
            tally[what] += len(items)
            self.failures += [f"{kind}: {what}: {item}" for item in items]

    def _finish(self, kind: str, tally: Counter) -> None:
        for problem in stands.differences(self.folder, self.plain):
            tally["wrong tables"] += 1
            self.failures.append(f"{kind}: wrong table: {problem}")
        kinds.release(self.folder)
        self._begin()

    def complete(self) -> None:
        """Let the last run end by itself."""
        outcome = forked(self.recipe, self.folder)
        tally = self.found.setdefault("none, at the end", Counter())
        self.sittings += 1
        self._look("none, at the end", tally, outcome, damaged=False)
        if outcome.code != 0:
            self.failures.append(f"the last run did not end: {outcome}")
        self._finish("none, at the end", tally)

    def result(self, seed: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "operations of a run": self.operations,
            "injected": sum(t["injected"] for t in self.found.values()),
            "sittings": self.sittings,
            "runs finished": self.runs - 1,
            "rows of a run": len(self.rows),
            "kinds": {kind: dict(self.found[kind]) for kind in SHARES if self.found.get(kind)},
            "skipped": self.skipped,
            "failures": self.failures,
        }


def _ended(outcome: Outcome) -> str:
    if outcome.code < 0:
        return "killed"
    return {0: "went on to the end", 1: "broke", 2: "said in a sentence"}.get(
        outcome.code, "ended tidily"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("top", type=Path)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.top.mkdir(parents=True, exist_ok=True)
    base = make_base(asked.top / "base", make_tokenizer(asked.top))
    watch()
    campaign = Campaign(asked.top, base, asked.seed)
    try:
        for number, kind in enumerate(schedule(asked.faults, asked.seed), start=1):
            campaign.inject(kind)
            print(f"{number} {kind}: {len(campaign.failures)} failures", file=sys.stderr)
        campaign.complete()
    finally:
        kinds.release(campaign.folder)
    print(json.dumps(campaign.result(asked.seed)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
