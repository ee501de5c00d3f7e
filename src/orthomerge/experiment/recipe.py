"""A recipe: what to run, validated before any work starts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from orthomerge.adapters import CONSTRAINTS, SHARE
from orthomerge.errors import MergeError, RecipeError, unknown_name
from orthomerge.features import GRANULARITIES
from orthomerge.merging import get_method
from orthomerge.subspace import get_solver, list_solvers
from orthomerge.tasks import get_task

PEFT_STARTS = ("default", "default_unit")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Part):
    """Rows a task, drawn under `seed` from its fixed pools."""

    train: int = Field(default=400, gt=0)
    selection: int = Field(default=100, gt=0)
    test: int = Field(default=300, gt=0)
    max_length: int = Field(default=48, gt=2)
    seed: int = 0


class AdapterShape(_Part):
    """The LoRA adapter: the paper's defaults."""

    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    targets: list[str] = Field(default=["query", "value"], min_length=1)


class StatisticsPart(_Part):
    """The unlabelled sample of each task behind its statistics."""

    samples: int = Field(default=100, gt=0)
    seed: int = 0


class Training(_Part):
    """One training; `learning_rate` may be a list, from which each arm takes its own best.

    With a `rate_tolerance` it takes the lowest rate whose score on the selection split is at most
    that far below the best one: a higher rate buys nothing there, and larger updates merge worse.
    """

    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=16, gt=0)
    learning_rate: float | list[float] = 2e-3
    rate_tolerance: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.06, ge=0, lt=1)

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | list[float]) -> float | list[float]:
        rates = value if isinstance(value, list) else [value]
        if not rates or min(rates) <= 0:
            raise ValueError("must be a positive number or a list of them")
        return value


class Arm(_Part):
    """One way to start and train: a line in the figure.

    `start` is "default" (PEFT's), "default_unit" (the same, rows rescaled to norm 1) or a solver;
    `share` is what the constraint "project" keeps A out of, `room` what it keeps A within; `quiet`
    gives layers ranks by how many directions have at most that part of the others' mean energy;
    `samples` overrides the recipe's number of samples behind the statistics; `seed_policy` says
    whether tasks draw from one seed or each from its own.
    """

    start: str
    granularity: str = "token"
    constraint: str = "init"
    share: float = Field(default=SHARE, gt=0, lt=1)
    room: int | None = Field(default=None, gt=0)
    quiet: float | None = Field(default=None, gt=0)
    samples: int | None = Field(default=None, gt=0)
    seed_policy: Literal["per_task", "shared"] = "per_task"
    learning_rate: float | list[float] | None = None
    seeds: list[int] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def solver(self) -> str | None:
        """The solver behind the start, None for PEFT's own."""
        return None if self.start in PEFT_STARTS else self.start

    @model_validator(mode="after")
    def _names(self) -> Arm:
        starts = [*PEFT_STARTS, *(s.name for s in list_solvers())]
        if self.start not in starts:
            raise unknown_name("start", self.start, starts, error=RecipeError)
        if self.constraint not in CONSTRAINTS:
            raise unknown_name("constraint", self.constraint, CONSTRAINTS, error=RecipeError)
        if self.granularity not in GRANULARITIES:
            raise unknown_name("granularity", self.granularity, GRANULARITIES, error=RecipeError)
        if self.solver is None and (self.constraint == "project" or self.quiet):
            raise RecipeError(
                f"the start '{self.start}' knows no statistics, which 'project' and 'quiet' need: "
                "name a solver."
            )
        valid = get_solver(self.start).options if self.solver else {}
        for option in self.options:
            if option not in valid:
                raise unknown_name(
                    f"option of the start '{self.start}'", option, valid, error=RecipeError
                )
        return self


class Merge(_Part):
    """One merging method at each of `weights`, which multiply every adapter's update.

    Of the weights in `choose_from` only the one with the best mean score on the selection split is
    tested too; weights and candidates of an arm and seed are chosen for all tasks together.
    """

    method: str
    weights: list[float] = Field(default=[1.0], min_length=1)
    choose_from: list[float] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict)
    rank: int | None = Field(default=None, gt=0)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the merge is called with: the options, and the rank where one is asked for."""
        return dict(self.options) | ({"rank": self.rank} if self.rank else {})

    @model_validator(mode="after")
    def _names(self) -> Merge:
        valid = get_method(self.method).options
        for option in self.options:
            if option not in valid and f"{option}_" not in valid:
                raise unknown_name(
                    f"option of the method '{self.method}'", option, valid, error=MergeError
                )
        return self


class Recipe(_Part):
    """The whole of a run. See `recipes/demo.yaml` for one with every key explained."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    base: str
    tasks: list[str] = Field(min_length=2)
    arms: dict[str, Arm] = Field(min_length=1)
    merges: list[Merge] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    data: Data = Data()
    adapter: AdapterShape = AdapterShape()
    statistics: StatisticsPart = StatisticsPart()
    training: Training = Training()
    save_merged: bool = False

    @model_validator(mode="after")
    def _tasks(self) -> Recipe:
        for name in self.tasks:
            get_task(name)
        twice = {t for t in self.tasks if self.tasks.count(t) > 1}
        if twice:
            raise RecipeError(f"task '{twice.pop()}' is named twice: name each task once.")
        return self

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds an arm runs with."""
        return self.arms[arm].seeds or self.seeds

    def learning_rates_of(self, arm: str) -> list[float]:
        """The learning rates an arm may choose from."""
        rates = self.arms[arm].learning_rate
        rates = self.training.learning_rate if rates is None else rates
        return list(rates) if isinstance(rates, list) else [rates]


def load_recipe(source: str | Path) -> tuple[Recipe, str]:
    """A recipe and its text, from a path or the name of one that comes with the package.

    Raises:
        RecipeError: no such file, not YAML, a key that does not exist (the message names the
            nearest), or a value that does not fit.
        UnknownNameError: a task, method, solver or start that does not exist.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        packaged = files("orthomerge.recipes")
        names = sorted(p.name for p in packaged.iterdir() if p.name.endswith(".yaml"))
        if path.name not in names or len(path.parts) > 2:
            raise RecipeError(
                f"no recipe '{source}': no such file; recipes that come along: {', '.join(names)}."
            )
        text = packaged.joinpath(path.name).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        place = getattr(problem, "problem_mark", None)
        line = f" in line {place.line + 1}" if place else ""
        raise RecipeError(
            f"recipe '{source}' is not YAML{line}: {getattr(problem, 'problem', problem)}."
        ) from problem
    if not isinstance(values, dict):
        raise RecipeError(f"recipe '{source}' is not a mapping of keys: see recipes/demo.yaml.")
    return parse_recipe(values, where=f"recipe '{source}'"), text


def parse_recipe(values: dict[str, Any], *, where: str = "the recipe") -> Recipe:
    """A recipe from plain values; see `load_recipe` for what it raises."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as problem:
        raise _plain(problem, values, where) from problem


def _plain(problem: ValidationError, values: dict[str, Any], where: str) -> RecipeError:
    """The first of pydantic's findings as one sentence."""
    first = problem.errors(include_url=False)[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        parent = first["loc"][:-1]
        error = unknown_name("key", str(first["loc"][-1]), _fields(parent), error=RecipeError)
        inside = f" under '{'.'.join(map(str, parent))}'" if parent else ""
        return RecipeError(f"{where}{inside}: {error}")
    if first["type"] == "missing":
        return RecipeError(f"{where} has no '{place}', which it needs.")
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"{where}: '{place}' is {first['input']!r}: {message}.")


def _fields(location: tuple[int | str, ...]) -> list[str]:
    parts: dict[str, type[_Part]] = {
        "data": Data,
        "adapter": AdapterShape,
        "statistics": StatisticsPart,
        "training": Training,
        "arms": Arm,
        "merges": Merge,
    }
    model = parts.get(str(location[0]), Recipe) if location else Recipe
    return list(model.model_fields)
