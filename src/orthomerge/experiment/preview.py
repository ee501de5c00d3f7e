"""What a run would do: its steps and rows and what they take. Nothing is written or fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orthomerge.errors import AssetError, RecipeError
from orthomerge.experiment.choices import asked, steps_behind
from orthomerge.experiment.estimate import (
    Estimate,
    Throughput,
    estimate,
    estimated,
    measured,
    read_rates,
    wall_seconds,
    work_by_stage,
)
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.recipe_file import parse_recipe
from orthomerge.experiment.run import RUN, check_output, known_rows
from orthomerge.experiment.sizes import shapes_of
from orthomerge.experiment.steps import Step
from orthomerge.io.documents import Unreadable, parse_yaml
from orthomerge.io.files import fingerprint, is_folder
from orthomerge.io.rows import ResultRow
from orthomerge.io.tables import SUFFIXES
from orthomerge.models.assets import ResolvedModel, is_local, resolve_model
from orthomerge.models.wheels import is_here
from orthomerge.tasks import Task, TaskData, corpora, glue


class Preview(Experiment):
    """An experiment from what is on this machine alone.

    Hashes of names stand in for those of a base or rows that are not here: keys are then right in
    number and not in value, so `is_known` is false.
    """

    @cached_property
    def found(self) -> ResolvedModel | None:
        """The base model, if it is here.

        Raises:
            AssetError: a folder that is not there, or is not a model.
        """
        name = self.recipe.base
        try:
            return resolve_model(name, fetch=False)
        except AssetError:
            # A GGUF file that was never used yet is dequantised when the run begins.
            if is_folder(name) or (name.startswith((".", "~", "/")) and not is_local(name)):
                raise
            return None

    @cached_property
    def base(self) -> ResolvedModel:
        """The base model, or its name where it is not here."""
        name = self.recipe.base
        return self.found or ResolvedModel(name, "hub", None, fingerprint(name), name)

    @cached_property
    def _shapes(self) -> tuple[Any, str]:
        return shapes_of(self.recipe.base, self.found)

    @cached_property
    def meta_model(self) -> Any:
        """The base model's modules and shapes: of its config, or as published."""
        return self._shapes[0]

    @property
    def shapes_from(self) -> str:
        """Where the shapes are from."""
        return self._shapes[1]

    @cached_property
    def data(self) -> dict[str, TaskData]:
        """Each task's rows; none of a task whose rows are not here."""
        return {
            name: self.recipe.data.of(task)
            if place_of(task) in _HERE
            else TaskData([], [], [], fingerprint(name))
            for name, task in self.tasks.items()
        }

    @property
    def is_known(self) -> bool:
        """Whether base and rows are here, so that rows and artifacts of the folder fit."""
        here = (place_of(task) in _HERE for task in self.tasks.values())
        return self.found is not None and all(here)

    def check(self) -> None:
        """Refuse what can be known not to work; raises what `Experiment.check` does."""
        if self.is_known:
            super().check()
        elif self.found is not None:
            self.check_base()

    def left(self) -> tuple[dict[str, Step], list[str], dict[str, ResultRow]]:
        """The steps that are left to do, the keys of the finished run's rows, and those there."""
        rows = known_rows(self.output) if self.is_known else {}
        there: Callable[[Path], bool] = Path.exists if self.is_known else _nothing
        evaluations = asked(self, rows, assume=True)
        keys = dict.fromkeys(k for each in evaluations for k in self.row_keys(each).values())
        steps = steps_behind(self, evaluations, rows, there)
        return steps, list(keys), {key: rows[key] for key in keys if key in rows}

    def whole(self) -> dict[str, Step]:
        """All steps of the recipe, as if nothing was there."""
        return steps_behind(self, asked(self, {}, assume=True), {}, _nothing)


def _nothing(_path: Path) -> bool:
    return False


@dataclass(frozen=True)
class DryRun:
    """What a recipe would do in its folder.

    `base` and `data` say where they are or would come from; `kinds` what is left to do takes by
    kind of step; `rows` counts the rows of the finished run, `there` those that exist. Without
    known shapes of the base, `why` says so and `kinds` holds numbers of steps alone.
    """

    base: str
    data: dict[str, str]
    kinds: dict[str, Estimate]
    rows: int
    there: int
    workers: int
    wall_seconds: float
    speed: Throughput | None
    parameters: int = 0
    shapes: str = ""
    why: str = ""

    @property
    def jobs(self) -> dict[str, int]:
        """How many steps of each kind are left."""
        return {kind: found.jobs for kind, found in self.kinds.items()}

    @property
    def total(self) -> Estimate:
        """All kinds together: sums, and the largest peak of memory."""
        kinds = list(self.kinds.values())
        return Estimate(
            sum(k.jobs for k in kinds),
            sum(k.seconds for k in kinds),
            sum(k.disk for k in kinds),
            max((k.memory for k in kinds), default=0),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values; times in seconds and hours, sizes in bytes."""
        total = self.total
        return {
            "base": self.base,
            "data": self.data,
            "jobs": self.jobs,
            "rows": self.rows,
            "there": self.there,
            "parameters": self.parameters,
            "shapes": self.shapes or self.why,
            "throughput": self.speed and {"source": self.speed.source, "rates": self.speed.rates},
            "kinds": {
                kind: {"jobs": k.jobs, "seconds": k.seconds, "hours": k.seconds / 3600,
                       "disk": k.disk, "memory": k.memory}
                for kind, k in self.kinds.items()
            },
            "seconds": total.seconds,
            "hours": total.seconds / 3600,
            "disk": total.disk,
            "memory": total.memory,
            "workers": self.workers,
            "wall_seconds": self.wall_seconds,
            "wall_hours": self.wall_seconds / 3600,
        }  # fmt: skip


def dry_run(
    recipe: Recipe, output: str | Path, *, speed: Throughput | None = None, workers: int = 1
) -> DryRun:
    """Check what can be checked on this machine, and count what a run would do and take.

    Rows and artifacts of an earlier sitting count where base and data are both here, since only
    then are they known to fit. Without a `speed` it is that of the earlier sitting, else this
    machine's, measured for a moment.

    Raises:
        OutputError: the folder holds something else than a run.
        AssetError: a folder for a base that is not there, or is not a model.
        UnknownNameError, SubspaceError: a target or a rank that does not fit the base.
        TaskError: a task's file that cannot be trained on.
    """
    check_output(recipe, Path(output))
    exp = Preview(recipe, output)
    exp.check()
    steps, keys, there = exp.left()
    known: dict[str, Any] = {
        "base": _where(exp),
        "data": {name: place_of(task) for name, task in exp.tasks.items()},
        "rows": len(keys),
        "there": len(there),
        "workers": workers,
    }
    try:
        parameters, shapes = exp.size().parameters, exp.shapes_from
    except RecipeError as problem:
        counts: dict[str, Estimate] = {}
        for step in steps.values():
            before = counts.get(step.kind, Estimate(0, 0.0, 0, 0))
            counts[step.kind] = before._replace(jobs=before.jobs + 1)
        return DryRun(**known, kinds=counts, wall_seconds=0.0, speed=None, why=str(problem))
    speed = speed or _own_speed(exp)
    return DryRun(
        **known,
        kinds=estimate(exp, steps, speed),
        wall_seconds=wall_seconds(exp, steps, speed, workers),
        speed=speed,
        parameters=parameters,
        shapes=shapes,
    )


def _own_speed(exp: Preview) -> Throughput:
    record = exp.output / RUN
    try:
        return speed_of(str(record)) if record.is_file() else measured()
    except RecipeError:  # it was stopped before it trained anything
        return measured()


def speed_of(source: str) -> Throughput:
    """A speed by name: "measure" for this machine, a card, or a file.

    The file is the `run.json` of an earlier run, or `{"rates": {"train": operations a second}}`.

    Raises:
        UnknownNameError: no such card.
        RecipeError: a file without a speed.
    """
    if source == "measure":
        return measured()
    if not source.endswith(".json"):
        return estimated(source)
    found = read_rates(source)
    if "rates" in found:
        return Throughput(found["rates"], f"the rates in {source}")
    return throughput_of_run(found, source)


def throughput_of_run(record: Mapping[str, Any], source: str) -> Throughput:
    """What a finished run achieved: the operations of its recipe over its seconds, by stage.

    Raises:
        RecipeError: its recipe cannot be read, or it trained nothing.
    """
    try:
        exp = Preview(parse_recipe(parse_yaml(record["recipe"])), "")
        done = work_by_stage(exp, exp.whole())
    except Unreadable as problem:
        raise RecipeError(f"the recipe in {source} cannot be read: {problem}.") from problem
    seconds = {stage: s for stage, s in record["seconds"].items() if s > 0}
    rates = {stage: n / seconds[stage] for stage, n in done.items() if n and stage in seconds}
    if "train" not in rates:
        raise RecipeError(f"{source} has no time of training: name the run.json of another run.")
    return Throughput(rates, f"measured by the run of {source} ({record.get('machine', '?')})")


_PLACES = {"path": "a folder", "package": "a package, here", "hub": "here, from the hub"}


def _where(exp: Preview) -> str:
    if exp.found is not None:
        return _PLACES[exp.found.source]
    if is_local(exp.recipe.base):
        return "a GGUF file, would be dequantised"
    hub = "/" in exp.recipe.base
    return "would be downloaded from the hub" if hub else "would be fetched with pip"


_HERE = ("a file", "a folder", "a package, here")


def place_of(task: Task) -> str:
    """Where a task's rows are or would come from."""
    if task.source.endswith(SUFFIXES) and Path(task.source).is_file():
        return "a file"
    if task.name.startswith("glue/"):
        named = os.environ.get(glue.FOLDER_VARIABLE)
        return "a folder" if named else "would be downloaded from the hub"
    return "a package, here" if is_here(corpora.PACKAGE) else "would be fetched with pip"
