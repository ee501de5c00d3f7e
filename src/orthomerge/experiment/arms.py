"""Arms and merges of a recipe: how adapters are started, trained, converted and merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orthomerge.adapters import (
    CONSTRAINTS,
    ENERGY_FRACTION,
    FROZEN_B,
    STRENGTH,
    ConvertConfig,
    check_penalty,
)
from orthomerge.errors import RecipeError, unknown_name
from orthomerge.experiment.parts import Part
from orthomerge.merging import MergeConfig
from orthomerge.statistics import GRANULARITIES
from orthomerge.subspace import get_solver, list_solvers

PEFT_STARTS = ("default", "default_unit", "gaussian")


class Conversion(Part):
    """What an arm does to the trained adapters of another one, `from`: see `ConvertConfig`.

    `recover` trains so many steps more, at `learning_rate` or at the rate of the arm converted.
    """

    source: str = Field(alias="from")
    subspace: str = ConvertConfig.subspace
    refit: str = ConvertConfig.refit
    balance: float = ConvertConfig.balance
    ridge: float = ConvertConfig.ridge
    solver: str = ConvertConfig.solver
    energy_fraction: float = ConvertConfig.energy_fraction
    subspace_dim: int | None = Field(default=None, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)
    recover: int = Field(default=0, ge=0)
    learning_rate: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Conversion:
        self.config(0)
        return self

    def config(self, seed: int) -> ConvertConfig:
        """The conversion, for the library."""
        given = self.model_dump(exclude={"source", "recover", "learning_rate"})
        return ConvertConfig(**given, seed=seed)


class Arm(Part):
    """One way to start and train: a line in the figure.

    `start` is "default" (PEFT's), "default_unit" (the same, rows rescaled to norm 1), "gaussian"
    (PEFT's of that name, on which the paper's code starts its baseline) or a solver;
    `energy_fraction` and `subspace_dim` belong to the constraint "project" (`OsrmConfig`);
    `low_energy` gives layers ranks by how many directions have at most that part of the others'
    mean energy;
    `strength`, `penalty_moment` and `isotropic_share` are those of the constraint "penalty"
    (`OsrmConfig`), which goes with every start;
    `samples` overrides the recipe's number of samples behind the statistics; `seed_policy` says
    whether tasks draw from one seed or each from its own. `rank`, `alpha`, `targets` and `tasks`
    (a list, or how many of the recipe's first ones) override the recipe's. An arm with `convert`
    is like the arm it converts where it does not say otherwise, and trains nothing of its own.
    """

    start: str
    granularity: str = "token"
    constraint: str = "init"
    energy_fraction: float = Field(default=ENERGY_FRACTION, gt=0, lt=1)
    subspace_dim: int | None = Field(default=None, gt=0)
    strength: float = Field(default=STRENGTH, ge=0)
    penalty_moment: str = "others"
    isotropic_share: float = Field(default=0.0, ge=0)
    low_energy: float | None = Field(default=None, gt=0)
    samples: int | None = Field(default=None, gt=0)
    seed_policy: Literal["per_task", "shared"] = "per_task"
    rank: int | None = Field(default=None, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    targets: list[str] | None = Field(default=None, min_length=1)
    tasks: Annotated[int, Field(gt=1)] | Annotated[list[str], Field(min_length=2)] | None = None
    learning_rate: float | list[float] | None = None
    seeds: list[int] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    convert: Conversion | None = None

    @property
    def solver(self) -> str | None:
        """The solver behind the start, None for PEFT's own."""
        return None if self.start in PEFT_STARTS else self.start

    @model_validator(mode="after")
    def _names(self) -> Arm:
        starts = [*PEFT_STARTS, *(s.name for s in list_solvers())]
        if self.start not in starts:
            raise unknown_name("start", self.start, starts, error=RecipeError)
        constraints = (*CONSTRAINTS, FROZEN_B)
        if self.constraint not in constraints:
            raise unknown_name("constraint", self.constraint, constraints, error=RecipeError)
        if self.constraint == FROZEN_B and self.start != "default":
            raise RecipeError(
                f"the constraint '{FROZEN_B}' goes with the start 'default' alone: with B held a "
                "start of A changes nothing (docs/paper.md)."
            )
        if self.granularity not in GRANULARITIES:
            raise unknown_name("granularity", self.granularity, GRANULARITIES, error=RecipeError)
        if self.solver is None and (self.constraint == "project" or self.low_energy):
            raise RecipeError(
                f"the start '{self.start}' knows no statistics, which 'project' and 'low_energy' "
                "need: name a solver."
            )
        check_penalty(self.strength, self.penalty_moment, self.isotropic_share)
        given = {"strength", "penalty_moment", "isotropic_share"} & self.model_fields_set
        if given and self.constraint != "penalty":
            raise RecipeError(
                f"'{min(given)}' is for the constraint 'penalty', not '{self.constraint}': name "
                "that constraint, or leave the key out."
            )
        valid: Mapping[str, Any] = get_solver(self.start).options if self.solver else {}
        for option in self.options:
            if option not in valid:
                raise unknown_name(
                    f"option of the start '{self.start}'", option, valid, error=RecipeError
                )
        return self


class Merge(Part):
    """One merging method at each of `weights`, which multiply every adapter's update.

    Of the weights in `choose_from` only the one with the best mean score on the selection split is
    tested too; weights and candidates of an arm and seed are chosen for all tasks together.
    `seed` is for methods that draw; without one they draw under the run's.
    """

    method: str
    weights: list[float] = Field(default=[1.0], min_length=1)
    choose_from: list[float] = Field(default_factory=list[float])
    options: dict[str, Any] = Field(default_factory=dict)
    rank: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    energy: float | None = None
    seed: int | None = None

    def seed_of(self, run: int) -> int:
        """What a run of the seed `run` draws under in this merge."""
        return run if self.seed is None else self.seed

    @property
    def arguments(self) -> dict[str, Any]:
        """What the merge is called with: the options, and the rank where one is asked for."""
        asked = {"rank": self.rank, "energy": self.energy}
        return dict(self.options) | {key: value for key, value in asked.items() if value}

    def config(self, weight: float | None, run: int) -> MergeConfig:
        """The merge at one of the weights in a run of the seed `run`, for the library."""
        return MergeConfig(
            self.method, weight, rank=self.rank, energy=self.energy, seed=self.seed_of(run),
            options=self.options,
        )  # fmt: skip

    @model_validator(mode="after")
    def _fits(self) -> Merge:
        self.config(1.0, 0)
        return self
