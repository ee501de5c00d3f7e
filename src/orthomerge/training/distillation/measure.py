"""How near a student is to the teachers on texts held out, and the factors that came nearest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from orthomerge.factors import LoraFactors
from orthomerge.io.documents import read_json
from orthomerge.io.files import atomic_path, write_json
from orthomerge.statistics.distributed import process_rank
from orthomerge.training.distillation.batches import Place
from orthomerge.training.distillation.student import Classroom, Student

_SAID = "measured.json"


@dataclass(frozen=True)
class Measured:
    """How near the student was to the teachers after some steps, on texts held out.

    `distance` is the loss, the mean over tasks; `agreement` is by task, 1 for the same answers.
    """

    step: int
    distance: float
    agreement: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean agreement over tasks."""
        return sum(self.agreement.values()) / len(self.agreement)


class Referee:
    """Measures a student now and then, and keeps the factors of the best measurement.

    With a `folder` both survive the end of the process.
    """

    def __init__(
        self,
        room: Classroom,
        student: Student,
        held: Sequence[Sequence[int]],
        names: Sequence[str],
        *,
        patience: int | None,
        folder: Path | None,
        report: Callable[[Measured], None] | None = None,
    ) -> None:
        self._room, self._student, self._held, self._names = room, student, held, names
        self._patience, self._folder, self._report = patience, folder, report
        self.measured: list[Measured] = []
        self._best: dict[str, LoraFactors] = {}

    @property
    def best(self) -> Measured:
        """The measurement nearest to the teachers, the first of equals."""
        return min(self.measured, key=lambda m: m.distance)

    def factors(self) -> dict[str, LoraFactors]:
        """The factors of the best measurement."""
        return self._best

    def go_on_from(self, step: int) -> bool:
        """Take up what was measured up to a step; whether all of it is there."""
        if self._folder is None or not (self._folder / _SAID).is_file():
            return False
        said: Any = read_json(self._folder / _SAID)
        found = [m for m in (Measured(**entry) for entry in said) if m.step <= step]
        if not found:
            return False
        best = min(found, key=lambda m: m.distance)
        file = self._file(best.step)
        if not file.is_file():
            return False
        held = load_file(file)
        names = [key.removesuffix(".A") for key in held if key.endswith(".A")]
        self._best = {n: LoraFactors(held[f"{n}.A"], held[f"{n}.B"]) for n in names}
        self.measured = found
        return True

    def measure(self, step: int) -> bool:
        """Measure after a step; whether to train no longer."""
        now = _agreed(self._measured(step))
        if not self.measured or now.distance < self.best.distance:
            self._best = self._student.layers()
            self._keep(step)
        self.measured.append(now)
        if self._folder is not None and process_rank()[0] == 0:
            write_json(self._folder / _SAID, [asdict(m) for m in self.measured])
        if self._report is not None:
            self._report(now)
        return self._finished()

    def _finished(self) -> bool:
        if self._patience is None:
            return False
        best = self.measured.index(self.best)
        return len(self.measured) - 1 - best >= self._patience

    def _keep(self, step: int) -> None:
        if self._folder is None or process_rank()[0] > 0:
            return
        tensors: dict[str, Tensor] = {}
        for name, factors in self._best.items():
            tensors |= {f"{name}.A": factors.A, f"{name}.B": factors.B}
        with atomic_path(self._file(step)) as path:
            save_file(tensors, path)

    def _file(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"best-{step}.safetensors"

    def _measured(self, step: int) -> Measured:
        tasks, update = range(len(self._held)), self._student.update
        sums = [0.0] * len(tasks)
        said: list[list[Tensor]] = [[] for _ in tasks]
        rows: list[list[int]] = [[] for _ in tasks]
        places = [Place(t, r) for t, held in enumerate(self._held) for r in held]
        for chunk in self._room.chunks(places):
            with torch.no_grad():
                found = self._room.distances(chunk, update)
            for place, loss in zip(chunk, self._room.losses(found), strict=True):
                sums[place.task] += float(loss)
                rows[place.task].append(place.row)
            for task, answers in found.said.items():
                said[task].append(answers.cpu())
        distance = sum(s / len(h) for s, h in zip(sums, self._held, strict=True)) / len(tasks)
        agreement = {
            self._names[t]: self._room.form.agreement(
                t, torch.cat(said[t]), self._room.taught[t], rows[t]
            )
            for t in tasks
        }
        return Measured(step, distance, agreement)


def _agreed(mine: Measured) -> Measured:
    """The first process's measurement, so that all of them go on or stop together."""
    _, world = process_rank()
    if world == 1:
        return mine
    sent: list[Any] = [json.dumps(asdict(mine))]
    torch.distributed.broadcast_object_list(sent, src=0)
    found: Mapping[str, Any] = json.loads(sent[0])
    return Measured(**found)
