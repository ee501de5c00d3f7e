"""What each stage of a run takes: wall time, and the most memory that was held in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

_EVERY = 0.02  # seconds between two looks at the memory


@dataclass
class Costs:
    """By stage: seconds, which add up, and peaks in bytes, of which the largest stays.

    `memory` is what the process held (resident), `gpu_memory` what its tensors took on the GPU,
    empty where there is none.
    """

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    memory: dict[str, int] = field(default_factory=dict[str, int])
    gpu_memory: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, other: Costs) -> None:
        """Count the stages of another unit of work too."""
        for stage, value in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value
        for mine, theirs in (
            (self.memory, other.memory),
            (self.gpu_memory, other.gpu_memory),
        ):
            for stage, value in theirs.items():
                mine[stage] = max(mine.get(stage, 0), value)

    @contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """Count the block as (a part of) this stage; stages do not lie within one another."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began, watch = time.perf_counter(), _Watch()
        try:
            yield
        finally:
            found = Costs({name: time.perf_counter() - began}, {name: watch.peak()})
            if on_gpu:
                found.gpu_memory[name] = torch.cuda.max_memory_allocated()
            self.add(found)


class _Watch:
    """Looks at what this process holds until it is asked for the most it saw."""

    def __init__(self) -> None:
        self._process, self._over = psutil.Process(), threading.Event()
        self._most = self._now()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def peak(self) -> int:
        """End looking; bytes."""
        self._over.set()
        self._thread.join()
        return max(self._most, self._now())

    def _now(self) -> int:
        return self._process.memory_info().rss

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            self._most = max(self._most, self._now())
