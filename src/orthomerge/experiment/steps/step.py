"""What every kind of step says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from orthomerge.io.files import slug
from orthomerge.io.rows import ResultRow

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace

T = TypeVar("T")
Rows = Mapping[str, ResultRow]

# Raised when an artifact or a row would come out differently from the same inputs.
VERSION = 1


class Need(NamedTuple):
    """What one step takes of its machine: processors, GPUs, bytes of memory at its peak."""

    cpus: float
    gpus: float
    memory: int


class Cost(NamedTuple):
    """What one step is estimated to take, from shapes alone.

    `work` holds operations by stage, `disk` the bytes that it leaves, `memory` its peak in bytes
    above that of an idle process.
    """

    work: Mapping[str, float]
    disk: int
    memory: int


class Step(ABC):
    """One unit of work that a process does, from files to a file or to rows.

    A step is a frozen dataclass of plain values, so it can be sent to another process. Everything
    else it asks of the `Experiment`. Dependencies stand once, in `needs`: the plan, the schedule
    and the work itself follow it.
    """

    kind: ClassVar[str]
    """What the step is called under `resources:` in a recipe, in plans and in `jobs.jsonl`."""

    @abstractmethod
    def title(self, exp: Experiment) -> str:
        """The step in words."""

    @abstractmethod
    def key(self, exp: Experiment) -> str:
        """The hash of all that the step depends on; `Experiment.key` keeps it."""

    @abstractmethod
    def name(self, exp: Experiment) -> str:
        """The step's name in the run: the same name is the same result."""

    @abstractmethod
    def needs(self, exp: Experiment) -> Sequence[Artifact[Any]]:
        """The steps whose artifacts this one reads."""

    @abstractmethod
    def cost(self, exp: Experiment) -> Cost:
        """What the step is estimated to take."""

    @abstractmethod
    def is_done(self, exp: Experiment, rows: Rows, there: Callable[[Path], bool]) -> bool:
        """Whether nothing is left to do, by the rows that are known and the files `there`."""

    @abstractmethod
    def run(self, space: Workspace, emit: Callable[[ResultRow], None]) -> None:
        """Do it: the artifact is then in the output folder, or the rows were handed to `emit`."""


class Artifact(Step, Generic[T]):
    """A step that leaves a file or a folder, named after its key, and is read as a `T`."""

    stage: ClassVar[str]
    """What its time counts as."""
    stays: ClassVar[bool] = True
    """Whether what was read stays in memory for the steps that follow."""

    @abstractmethod
    def path(self, exp: Experiment) -> Path:
        """Where the artifact is."""

    @abstractmethod
    def read(self, space: Workspace, path: Path) -> T:
        """The artifact as it is there.

        Raises:
            OrthomergeError: it is damaged.
        """

    @abstractmethod
    def make(self, space: Workspace, path: Path) -> None:
        """Write the artifact at a path that takes its place once this is done.

        What the step needs is there.
        """

    def name(self, exp: Experiment) -> str:
        """The path within the output folder."""
        return self.path(exp).relative_to(exp.output).as_posix()

    def is_done(self, exp: Experiment, rows: Rows, there: Callable[[Path], bool]) -> bool:
        """Whether the artifact is there."""
        return there(self.path(exp))

    def run(self, space: Workspace, emit: Callable[[ResultRow], None]) -> None:
        """Make the artifact unless it is there and whole."""
        space.get(self)

    def place(self, exp: Experiment, folder: str, group: str, task: str, seed: int) -> Path:
        """The path of an artifact of one task and seed."""
        return exp.output / folder / group / f"seed{seed}" / f"{slug(task)}-{exp.key(self)[:12]}"


@dataclass(frozen=True)
class AdapterArtifact(Artifact[Path]):
    """A step that leaves the adapter of one task in an arm, at one learning rate of the arm."""

    arm: str
    task: str
    seed: int
    rate: float

    def title(self, exp: Experiment) -> str:
        """The step in words."""
        return f"{self.kind} {self.arm} · {self.task} · seed {self.seed} · {self.rate:g}"

    def path(self, exp: Experiment) -> Path:
        """A folder under `adapters/`."""
        return self.place(exp, "adapters", self.arm, self.task, self.seed)
