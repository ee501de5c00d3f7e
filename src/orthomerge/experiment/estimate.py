"""How long steps take: their operations over the speed of a machine, measured, read or assumed."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orthomerge import linalg
from orthomerge.errors import RecipeError, unknown_name
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.steps import STEPS, Step
from orthomerge.io.documents import is_object, read_json

# Stages that pass texts through the model; the others decompose or merge.
_PASSES = ("stats", "train", "fisher", "distill", "eval")
STAGES = (*_PASSES, "init", "convert", "merge")

# Peak dense operations a second in bfloat16 as the makers state them.
CARDS = {"h100": 989e12, "a100": 312e12, "l40s": 362e12, "rtx4090": 165e12}
# The share of the peak that is assumed for passes through a model, and for decompositions and
# merges, which run in float64 or are bound by memory. Assumptions, not measurements.
PASSES, ALGEBRA = 0.3, 0.01


@dataclass(frozen=True)
class Throughput:
    """Operations a second by stage, and in words where they are from."""

    rates: dict[str, float]
    source: str

    def seconds(self, work: Mapping[str, float]) -> float:
        """The time of work, in operations by stage; a stage that was never met goes as training."""
        return sum(n / self.rates.get(stage, self.rates["train"]) for stage, n in work.items())


class Estimate(NamedTuple):
    """What steps take together: by kind how many there are, seconds, bytes on disk, peak bytes."""

    jobs: int
    seconds: float
    disk: int
    memory: int


def estimate(exp: Experiment, steps: Mapping[str, Step], speed: Throughput) -> dict[str, Estimate]:
    """What steps take by kind, in the order of the kinds."""
    found: dict[str, Estimate] = {}
    for kind in (step.kind for step in STEPS):
        mine = [step for step in steps.values() if step.kind == kind]
        costs = [step.cost(exp) for step in mine]
        if mine:
            found[kind] = Estimate(
                len(mine),
                sum(speed.seconds(cost.work) for cost in costs),
                sum(cost.disk for cost in costs),
                max(exp.need(step).memory for step in mine),
            )
    return found


def work_by_stage(exp: Experiment, steps: Mapping[str, Step]) -> dict[str, float]:
    """Operations of steps by stage."""
    total: Counter[str] = Counter()
    for step in steps.values():
        total.update(step.cost(exp).work)
    return dict(total)


def wall_seconds(
    exp: Experiment, steps: Mapping[str, Step], speed: Throughput, workers: int
) -> float:
    """Seconds until all steps are done when each of so many workers takes the next that can begin.

    A choice that is open makes nobody wait here.
    """
    seconds = {name: speed.seconds(step.cost(exp).work) for name, step in steps.items()}
    place = {name: n for n, name in enumerate(steps)}
    graph = TopologicalSorter(
        {
            name: [n for need in step.needs(exp) if (n := need.name(exp)) in steps]
            for name, step in steps.items()
        }
    )
    graph.prepare()
    ready: list[tuple[int, str]] = []
    at_work: list[tuple[float, str]] = []
    now = 0.0
    while graph.is_active():
        for name in graph.get_ready():
            heapq.heappush(ready, (place[name], name))
        while ready and len(at_work) < workers:
            _, name = heapq.heappop(ready)
            heapq.heappush(at_work, (now + seconds[name], name))
        now, done = heapq.heappop(at_work)
        graph.done(done)
    return now


def estimated(card: str) -> Throughput:
    """The default for a known card: a share of its peak.

    Raises:
        UnknownNameError: no such card.
    """
    if card not in CARDS:
        raise unknown_name("card", card, CARDS)
    passes, algebra = PASSES * CARDS[card], ALGEBRA * CARDS[card]
    rates = {s: passes if s in _PASSES else algebra for s in STAGES}
    return Throughput(rates, f"an ESTIMATE for one {card} ({PASSES:.0%} of its peak)")


def read_rates(path: str | Path) -> dict[str, Any]:
    """The JSON of a throughput file, or of a run's `run.json`.

    Raises:
        RecipeError: no such file, or neither of the two.
    """
    path = Path(path)
    try:
        found = read_json(path)
    except OSError as problem:
        raise RecipeError(f"no throughput file '{path}': name a run.json of a run.") from problem
    except ValueError as problem:
        raise RecipeError(f"'{path}' is not JSON: name a run.json of a run.") from problem
    found = found if is_object(found) else {}
    of_run = isinstance(found.get("recipe"), str) and _numbers(found.get("seconds"))
    if not (_numbers(found.get("rates"), "train") or (of_run and "rates" not in found)):
        raise RecipeError(
            f"'{path}' holds no throughput: name a run.json, or a JSON file with "
            '{"rates": {"train": operations a second, ...}}.'
        )
    return found


def _numbers(value: Any, needed: str | None = None) -> bool:
    """Whether it is a mapping to numbers; where one is `needed`, each must be above zero."""
    if not is_object(value) or (needed is not None and needed not in value):
        return False
    least = 0.0 if needed is not None else -math.inf
    return all(isinstance(v, int | float) and least < v < math.inf for v in value.values())


def measured(size: int = 1024, seconds: float = 0.3) -> Throughput:
    """What this machine does now: products of matrices for passes, a decomposition for starts.

    Of what bare products reach, half is taken for a model: an assumption.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = 8192 if device == "cuda" else size
    a = torch.randn(size, size, device=device, dtype=dtype)
    passes = _rate(lambda: a @ a, 2 * size**3, seconds, device)
    b = torch.randn(512, 512, device=device, dtype=torch.float64)
    algebra = _rate(lambda: linalg.eigh(b @ b.T), 9 * 512**3, seconds, device)
    rates = {s: passes / 2 if s in _PASSES else algebra for s in STAGES}
    return Throughput(rates, f"measured on this machine ({device})")


def _rate(work: Any, operations: float, seconds: float, device: str) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        wait()
        times += 1
    return operations * times / (time.perf_counter() - began)
