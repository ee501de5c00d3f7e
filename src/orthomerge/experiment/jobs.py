"""What a run is made of: independent jobs, each named after the content it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KINDS = ("stats", "start", "train", "fisher", "eval", "merge")
"""The kinds of jobs: the pieces a run is made of, and the two kinds of evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """One question a recipe asks: an arm's adapters of one seed, alone or merged, on a split.

    `keys` holds each task with the key of its row: one task for an adapter alone (`merge` and
    `weight` are None), all of them for a merge, which is the recipe's at the place `merge`.
    """

    arm: str
    seed: int
    rate: float
    split: str
    keys: tuple[tuple[str, str], ...]
    merge: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Job:
    """A piece of work that one process does by itself, from files to files or rows.

    `id` is made of the content key of what the job makes, so the same id is the same result;
    `needs` are the ids of the jobs whose results it reads; `arguments` are plain values that can
    be sent to another process.
    """

    id: str
    kind: str
    title: str
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()
