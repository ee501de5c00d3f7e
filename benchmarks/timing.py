"""What the benchmarks share: medians of one run, and the file a table is made of."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def median_seconds(work: Callable[[], Any], repeats: int = 5, warm: bool = True) -> float:
    """Median wall seconds of `repeats` calls, after one that is not counted."""
    if warm:
        work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def paired_ratio(
    work: Callable[[], Any], against: Callable[[], Any], repeats: int = 5
) -> tuple[float, float, float]:
    """Median seconds of both, taken in turns, and the median of the ratios of neighbours.

    In turns, so that a machine that slows down slows both.
    """
    work()
    against()
    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(median_seconds(against, 1, warm=False))
        ours.append(median_seconds(work, 1, warm=False))
    ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
    return statistics.median(ours), statistics.median(theirs), ratio


def machine() -> str:
    """The processor and how many threads the linear algebra uses."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def gflops(dtype: torch.dtype = torch.float64, size: int = 2048) -> float:
    """What a large matrix product reaches here, in GFLOP/s: the roof of compute-bound work."""
    a = torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: a @ a) / 1e9


def bandwidth(dtype: torch.dtype = torch.float64, size: int = 8192) -> float:
    """What a matrix-vector product reads here, in GB/s: the roof of memory-bound work."""
    a, x = torch.randn(size, size, dtype=dtype), torch.randn(size, dtype=dtype)
    return a.numel() * a.element_size() / median_seconds(lambda: a @ x) / 1e9


def save(name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Write `results/<name>.json` and print its rows."""
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": machine(), **about, "rows": rows}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))
    print(f"{path.name}: {record['machine']}")
