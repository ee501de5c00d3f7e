"""What a run keeps beside its rows so that its page needs no adapter: plain lines of JSON.

One kind of line per file: `Disturbance` per arm and seed, `EnergySpectrum` per task and layer,
`BandShares` per adapter and layer, `Curve` per adapter, `Distillation` per distilled merge. The
`key` of a line is the hash of all that it was computed from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from orthomerge.io.documents import is_object
from orthomerge.io.rows import read_records

_T = TypeVar("_T")
Matrix = list[list[float | None]]
"""Rows of numbers; None where a quotient is infinite."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """`I[i→j]` of an arm's adapters: `matrix[i][j]` over all layers, `layers` for each layer.

    Rows are adapters, columns tasks, both in the order of `tasks`; the diagonal is 1. `key` is the
    hash of the adapters and statistics behind it.
    """

    FILE: ClassVar[str] = "interference.jsonl"

    key: str
    arm: str
    seed: int
    learning_rate: float
    granularity: str
    tasks: list[str]
    matrix: Matrix
    layers: dict[str, Matrix] = field(default_factory=dict[str, Matrix])

    def __post_init__(self) -> None:
        size = len(self.tasks)
        for matrix in (self.matrix, *self.layers.values()):
            _require(len(matrix) == size and all(len(row) == size for row in matrix))


@dataclass(frozen=True, slots=True)
class EnergySpectrum:
    """Eigenvalues of a task's second moment at a layer's input, and of the other tasks' mean one.

    Both descending, as parts of their sum, at the directions `places` (from 1 to `width`): all of
    the first ones, then evenly spaced.
    """

    FILE: ClassVar[str] = "spectra.jsonl"

    key: str
    task: str
    layer: str
    width: int
    places: list[int]
    own: list[float]
    others: list[float]

    def __post_init__(self) -> None:
        _require(len(self.places) == len(self.own) == len(self.others))


@dataclass(frozen=True, slots=True)
class BandShares:
    """Where the rows of a trained `A` lie: the part of `‖A‖²` in each band of eigen-directions.

    Bands are equally many neighbouring directions, from highest to lowest energy, of the task's
    `own` features and of the `others'`. `seen` is `tr(A S Aᵀ) d / (‖A‖² tr S)` of the two: 1 for
    rows that lie anyhow, 0 for rows that see nothing.
    """

    FILE: ClassVar[str] = "subspaces.jsonl"

    key: str
    arm: str
    seed: int
    task: str
    layer: str
    own: list[float]
    others: list[float]
    seen: list[float]

    def __post_init__(self) -> None:
        _require(len(self.seen) == 2)


@dataclass(frozen=True, slots=True)
class Curve:
    """The training loss of one adapter: `losses` are pairs of a step and a loss."""

    FILE: ClassVar[str] = "training.jsonl"

    key: str
    arm: str
    seed: int
    task: str
    learning_rate: float
    losses: list[list[float]]

    def __post_init__(self) -> None:
        _require(all(len(pair) == 2 and math.isfinite(pair[0]) for pair in self.losses))


@dataclass(frozen=True, slots=True)
class Distillation:
    """What one distilled merge took, and how near it came to the adapters' own answers.

    `weight` and `options` are those of its rows. `scale` is what the merge to begin from was
    multiplied by, `texts` counts those of all tasks, `best` is the one of `steps` that was kept.
    `before` and `after` are the agreement by task on texts held out, at the start and at `best`.
    """

    FILE: ClassVar[str] = "distillation.jsonl"

    key: str
    arm: str
    seed: int
    learning_rate: float
    weight: float | None
    options: dict[str, Any]
    scale: float
    texts: int
    steps: int
    best: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]

    def __post_init__(self) -> None:
        _require(self.before.keys() == self.after.keys() and len(self.after) > 0)


@dataclass(frozen=True)
class Analyses:
    """All of it; a list is empty where its file is not there."""

    disturbances: list[Disturbance] = field(default_factory=list[Disturbance])
    spectra: list[EnergySpectrum] = field(default_factory=list[EnergySpectrum])
    shares: list[BandShares] = field(default_factory=list[BandShares])
    curves: list[Curve] = field(default_factory=list[Curve])
    distillations: list[Distillation] = field(default_factory=list[Distillation])


def read_analyses(folder: str | Path) -> Analyses:
    """What is in a run's folder beside its rows.

    Raises:
        OrthomergeError: a line that is not the last is not what its file holds.
    """

    def read(kind: type[_T], name: str) -> list[_T]:
        path = Path(folder) / name
        return read_records(path, kind) if path.is_file() else []

    return Analyses(
        read(Disturbance, Disturbance.FILE),
        read(EnergySpectrum, EnergySpectrum.FILE),
        read(BandShares, BandShares.FILE),
        read(Curve, Curve.FILE),
        read(Distillation, Distillation.FILE),
    )


def _require(fits: bool) -> None:
    """Refuse a record whose parts are not of one size; what reads lines says which line it was."""
    if not fits:
        raise ValueError("its parts are not of one size")


def to_lines(
    records: Iterable[Disturbance | EnergySpectrum | BandShares | Curve | Distillation],
) -> str:
    """The records as lines of JSON; numbers keep four digits, which no figure can show."""
    return "".join(
        json.dumps(_short(asdict(record)), ensure_ascii=False, separators=(",", ":")) + "\n"
        for record in records
    )


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if is_object(value):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_short(v) for v in cast(Sequence[Any], value)]
    return value
