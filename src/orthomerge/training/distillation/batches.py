"""Which texts a step sees, cut into passes of texts of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from orthomerge.io.files import derive_seed


class Place(NamedTuple):
    """A text: the number of its task, and its own among the task's texts."""

    task: int
    row: int


@dataclass(frozen=True)
class Pass:
    """Texts that run together, each with its weight in the loss."""

    places: list[Place]
    weights: list[float]


def plan_steps(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int]],
    *,
    steps: int,
    batch_size: int,
    passes: int,
    world: int,
    rank: int,
    seed: int,
) -> Iterator[list[Pass]]:
    """The passes of one process for every step; `rows` are the texts of each task to train on.

    Each step takes `batch_size` texts of every task, each text once before any comes again. They
    are sorted by length and cut into `passes · world` parts, of which each process takes its own.
    Weights are such that tasks count alike and that the mean over passes and processes is the
    mean over tasks: they do not depend on the cut.
    """
    draws = [
        Draws(task, batch_size, derive_seed(seed, "distill", str(place)))
        for place, task in enumerate(rows)
    ]
    for _ in range(steps):
        chosen = [(Place(t, r), len(draw)) for t, draw in enumerate(draws) for r in draw.next()]
        chosen.sort(key=lambda item: lengths[item[0].task][item[0].row])
        parts = passes * world
        cuts = [round(i * len(chosen) / parts) for i in range(parts + 1)]
        mine: list[Pass] = []
        for part in range(rank, parts, world):
            chunk = chosen[cuts[part] : cuts[part + 1]]
            weights = [parts / (len(rows) * size) for _, size in chunk]
            mine.append(Pass([place for place, _ in chunk], weights))
        yield mine


class Draws:
    """Seeded batches of a task's rows: every row once before any comes again."""

    def __init__(self, rows: Sequence[int], size: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rows, self._size = list(rows), min(size, len(rows))
        self._waiting: list[int] = []

    def __len__(self) -> int:
        return self._size

    def next(self) -> list[int]:
        """The rows of the next step."""
        while len(self._waiting) < self._size:
            order = torch.randperm(len(self._rows), generator=self._generator)
            self._waiting += [self._rows[int(i)] for i in order]
        taken, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return taken
