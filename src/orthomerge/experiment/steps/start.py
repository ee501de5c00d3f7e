"""The initial adapter of one task: PEFT's own, or one that a solver chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthomerge.adapters import (
    FROZEN_B,
    PEFT_START,
    OsrmConfig,
    captured,
    new_lora,
    orthonormal_B,
    plan_ranks,
    read_adapter,
    read_excluded,
    save_start,
    start_adapter,
    unit_rows,
)
from orthomerge.errors import AdapterError
from orthomerge.experiment.sizes import DECOMPOSITION
from orthomerge.experiment.steps.statistics import StatisticsStep
from orthomerge.experiment.steps.step import VERSION, Artifact, Cost
from orthomerge.io.documents import read_json
from orthomerge.io.files import derive_seed, fingerprint
from orthomerge.io.names import TRAINING
from orthomerge.records import start_record
from orthomerge.statistics import Statistics

if TYPE_CHECKING:
    from orthomerge.experiment.experiment import Experiment
    from orthomerge.experiment.workspace import Workspace


@dataclass(frozen=True)
class StartStep(Artifact[Path]):
    """Write the adapter that a task's training begins with; arms that start alike share it."""

    kind, stage = "start", "init"
    arm: str
    task: str
    seed: int

    def title(self, exp: Experiment) -> str:
        """The step in words."""
        return f"start {self.arm} of {self.task} · seed {self.seed}"

    def key(self, exp: Experiment) -> str:
        """The hash of base, adapter, solver and the statistics that it looks at."""
        arm = exp.recipe.arms[self.arm]
        depends: dict[str, Any] = {
            "piece": ["start", VERSION],
            "base": exp.base.sha256,
            "adapter": exp.recipe.adapter_of(self.arm).model_dump(),
            "start": arm.start,
            "options": arm.options,
            "seed": self.seed if arm.seed_policy == "shared" else [self.seed, self.task],
        }
        if exp.in_words:
            depends["form"] = "text"
        else:
            depends["head"] = [self.seed, self.task, *exp.head(self.task)]
        if arm.solver:
            keys = {task: exp.key(step) for task, step in self._statistics(exp).items()}
            depends["own"] = keys.pop(self.task)
            depends["others"] = list(keys.values())
        if arm.constraint == "project":
            depends["kept out"] = arm.subspace_dim or arm.energy_fraction
        if arm.constraint == FROZEN_B:
            depends["held"] = "B"
        if arm.low_energy:
            depends["quiet"] = arm.low_energy
        return fingerprint(depends)

    def path(self, exp: Experiment) -> Path:
        """A folder under `starts/`."""
        return self.place(exp, "starts", exp.recipe.arms[self.arm].start, self.task, self.seed)

    def needs(self, exp: Experiment) -> Sequence[StatisticsStep]:
        """Every task's statistics, where a solver looks at them."""
        return list(self._statistics(exp).values())

    def _statistics(self, exp: Experiment) -> dict[str, StatisticsStep]:
        return StatisticsStep.for_arm(exp, self.arm) if exp.recipe.arms[self.arm].solver else {}

    def cost(self, exp: Experiment) -> Cost:
        """An eigendecomposition per distinct input; it takes three of its matrices."""
        shape, tasks = exp.recipe.adapter_of(self.arm), len(exp.tasks_of(self.arm))
        size, solved = exp.size(shape.targets), exp.recipe.arms[self.arm].solver is not None
        work = DECOMPOSITION * sum(d**3 for d in size.inputs) if solved else 0
        largest = max(size.inputs, default=0)
        moments = tasks * size.moments() + 3 * 8 * largest * largest if solved else 0
        disk = 4 * size.adapter(shape.rank)
        return Cost({"init": float(work)}, disk, size.weights + disk + moments)

    def read(self, space: Workspace, path: Path) -> Path:
        """The folder, once all of it can be read."""
        return read_folder(path, excluded=self._projects(space.exp))

    def _projects(self, exp: Experiment) -> bool:
        return exp.recipe.arms[self.arm].constraint == "project"

    def make(self, space: Workspace, path: Path) -> None:
        """Wrap the model, choose the factors and save them with what training has to keep to."""
        exp, arm = space.exp, space.exp.recipe.arms[self.arm]
        shape = exp.recipe.adapter_of(self.arm)
        others, own, config = self.problem(space) if arm.solver else ([], None, None)
        if config is not None and config.constraint == "penalty":
            # The start is that of a free training; what is charged comes with the training.
            config = replace(config, constraint="init")
        draw = self.draw(exp)
        model = new_lora(
            space.model(self.task, self.seed),
            targets=shape.targets,
            rank=shape.rank,
            alpha=shape.alpha,
            dropout=shape.dropout,
            rslora=shape.rslora,
            task_type=exp.task_type,
            seed=draw,
            ranks=plan_ranks(others, shape.rank, arm.low_energy)[0] if arm.low_energy else None,
            gaussian=arm.start == "gaussian",
        )
        directions, seen = None, {}
        if arm.start == "default_unit":
            unit_rows(model)
        elif arm.constraint == FROZEN_B:
            orthonormal_B(model, seed=draw)
        elif config is not None:
            started = start_adapter(model, others, own, config)
            directions, seen = started.directions, captured(started.chosen)
        files = {task: step.path(exp) for task, step in self._statistics(exp).items()}
        record = start_record(
            config, base=exp.base.name, base_sha256=exp.base.sha256,
            own=files.pop(self.task, None), others=list(files.values()), low_energy=arm.low_energy,
            captured=seen, beside=self.path(exp).parent, start=arm.start, task=self.task,
            drawn=draw,
        )  # fmt: skip
        save_start(model, path, directions, record=record)

    def draw(self, exp: Experiment) -> int:
        """The seed that the start and a penalty draw under."""
        shared = exp.recipe.arms[self.arm].seed_policy == "shared"
        return derive_seed(self.seed) if shared else derive_seed(self.seed, self.task)

    def problem(self, space: Workspace) -> tuple[list[Statistics], Statistics, OsrmConfig]:
        """The others' statistics, the own ones, how to choose and what training keeps to."""
        exp, arm = space.exp, space.exp.recipe.arms[self.arm]
        config = OsrmConfig(
            solver=arm.solver or PEFT_START,
            seed=self.draw(exp),
            **{
                f.name: getattr(arm, f.name)
                for f in fields(OsrmConfig)
                if f.name in type(arm).model_fields
            },
        )
        found = {t: space.get(step) for t, step in StatisticsStep.for_arm(exp, self.arm).items()}
        own = found.pop(self.task)
        return list(found.values()), own, config


def read_folder(folder: Path, *, excluded: bool = False, losses: bool = False) -> Path:
    """Look at all that is read of a start's or an adapter's folder; returns the folder.

    `excluded` asks for the directions of the constraint "project", `losses` for those of training.

    Raises:
        AdapterError: a part is missing, cut or not what it should be.
    """
    read_adapter(folder)
    if excluded:
        read_excluded(folder)
    if losses:
        read_losses(folder)
    return folder


def read_losses(folder: Path) -> list[list[float]]:
    """The pairs of a step and a loss of an adapter's training.

    Raises:
        AdapterError: they cannot be read.
    """
    try:
        found = read_json(folder / TRAINING)["losses"]
        # Floats, as they are when they come back from the run's own file.
        return [[float(step), float(loss)] for step, loss in found]
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise AdapterError(
            f"'{folder / TRAINING}' cannot be read ({problem}): remove '{folder}' and call the "
            "same command again."
        ) from problem
