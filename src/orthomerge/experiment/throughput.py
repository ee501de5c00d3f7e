"""How fast a machine works, in operations a second by stage: measured, read, or estimated."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthomerge import linalg
from orthomerge.errors import RecipeError, unknown_name
from orthomerge.io.documents import is_object, read_json

STAGES = ("stats", "init", "convert", "train", "fisher", "merge", "eval")
# What decomposes or merges, rather than passes texts through the model.
_ALGEBRA = ("init", "convert", "merge")

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

    def seconds(self, work: dict[str, float]) -> float:
        """The time of work, in operations by stage; a stage that was never met goes as training."""
        return sum(n / self.rates.get(stage, self.rates["train"]) for stage, n in work.items())


def estimated(card: str) -> Throughput:
    """The default for a known card: a share of its peak.

    Raises:
        UnknownNameError: no such card.
    """
    if card not in CARDS:
        raise unknown_name("card", card, CARDS)
    passes, algebra = PASSES * CARDS[card], ALGEBRA * CARDS[card]
    rates = {s: algebra if s in _ALGEBRA else passes for s in STAGES}
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


def measured(size: int = 1024, seconds: float = 1.0) -> Throughput:
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
    rates = {s: algebra if s in _ALGEBRA else passes / 2 for s in STAGES}
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
