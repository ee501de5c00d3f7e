"""What an orthogonal start, and a conversion, are made of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

from orthomerge.adapters.refit import RIDGE
from orthomerge.errors import RecipeError, SubspaceError, unknown_name
from orthomerge.subspace import get_solver

CONSTRAINTS = ("init", "freeze", "project", "penalty")
FROZEN_B = "freeze_B"
"""The control that holds `B` instead: of a training, not of an orthogonal start."""
ENERGY_FRACTION = 0.9
"""The default fraction of the others' energy whose directions `project` excludes."""
STRENGTH = 10.0
"""The strength λ of the constraint "penalty", unless said otherwise."""
PENALTY_MOMENTS = ("others", "isotropic", "pooled", "random")
"""What the penalty charges along: the others' inputs, or a control of the same trace."""
PEFT_START = "default"
"""In the place of a solver: `A` stays where PEFT's own start drew it."""
RECOMMENDED: Mapping[str, Any] = {"solver": PEFT_START, "constraint": "penalty"}
"""What kept single scores and most of a merge in our comparison (README)."""
SUBSPACES = ("low_energy", "project", "start")
REFITS = ("outputs", "weights")
CONVERT_ENERGY_FRACTION = 0.7
"""The same for a conversion: a larger fraction costs too much of the own task."""

OLD_NAMES = {"share": "energy_fraction", "room": "subspace_dim", "quiet": "low_energy"}
"""Fields of version 0.1 by their present names: taken for one release more."""

_Config = TypeVar("_Config")


def _with_old_names(kind: type[_Config]) -> type[_Config]:
    made = kind.__init__

    @wraps(made)
    def init(self: _Config, *args: Any, **values: Any) -> None:
        for old in OLD_NAMES.keys() & values.keys():
            new = OLD_NAMES[old]
            warnings.warn(
                f"{kind.__name__}({old}=...) is now {new}=...", DeprecationWarning, stacklevel=2
            )
            values[new] = values.pop(old)
        made(self, *args, **values)

    kind.__init__ = init
    for old in ("share", "room"):
        setattr(kind, old, property(attrgetter(OLD_NAMES[old])))
    return kind


@_with_old_names
@dataclass(frozen=True)
class OsrmConfig:
    """How to choose `A` and what training may do with it; by itself the paper's way.

    `solver` names a function of `orthomerge.subspace`, or is "default" for PEFT's own start, which
    goes with the constraint "penalty"; `options` go to it; `granularity` is the one the statistics
    must have; `weights` are the others' weights in `S_other`, equal when None. `constraint` is

    - "init": the paper's; only the start is chosen, and training is free;
    - "freeze": `A` is held;
    - "project": `A` trains, but never into the dominant directions that hold `energy_fraction` of
      the others' energy or, with `subspace_dim`, only within so many best directions of the solver;
    - "penalty": `A` and `B` train freely, and the loss is charged `strength` times the energy that
      the update adds to the others' outputs (`Penalty`). `penalty_moment` puts a control of the
      same trace in the place of `S_other`: "isotropic" the identity, "pooled" the mean of all
      tasks with the own one, "random" `S_other` turned to directions drawn at random;
      `isotropic_share` ρ adds `ρ tr(S_other) / d_in · I`.

    Raises:
        UnknownNameError: no such solver.
        SubspaceError: an option the solver does not have.
        RecipeError: no such constraint or control, a number out of its range, or PEFT's own start
            with the constraint "project".
    """

    solver: str = "min_eigen"
    granularity: str = "token"
    constraint: str = "init"
    energy_fraction: float = ENERGY_FRACTION
    subspace_dim: int | None = None
    strength: float = STRENGTH
    penalty_moment: str = PENALTY_MOMENTS[0]
    isotropic_share: float = 0.0
    seed: int = 0
    weights: tuple[float, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def recommended(cls, **changes: Any) -> OsrmConfig:
        """What kept most of a merge in our comparison (`RECOMMENDED`), with `changes`.

        The training has to obey its constraint: `orthomerge train` does, and a Trainer with the
        callback that `orthomerge.prepare` gives.
        """
        return cls(**{**RECOMMENDED, **changes})

    @property
    def needs_own(self) -> bool:
        """Whether the start cannot do without the task's own statistics."""
        return self.solver != PEFT_START and get_solver(self.solver).needs_own

    def __post_init__(self) -> None:
        if self.solver != PEFT_START:
            get_solver(self.solver).check_options(self.options)
        elif self.options:
            raise SubspaceError(f"the start '{PEFT_START}' has no options: leave them out.")
        if self.constraint not in CONSTRAINTS:
            raise unknown_name("constraint", self.constraint, CONSTRAINTS, error=RecipeError)
        if self.solver == PEFT_START and self.constraint == "project":
            raise RecipeError(
                f"the start '{PEFT_START}' knows no statistics, which 'project' needs: name a "
                "solver."
            )
        check_penalty(self.strength, self.penalty_moment, self.isotropic_share)
        if not 0 < self.energy_fraction < 1:
            raise RecipeError(
                f"energy_fraction {self.energy_fraction} is not between 0 and 1: "
                f"{ENERGY_FRACTION} is the default."
            )
        if self.subspace_dim is not None and self.subspace_dim < 1:
            raise RecipeError(
                f"subspace_dim {self.subspace_dim} is not a number of directions: try 32."
            )


def settled(
    solver: str | None, constraint: str | None, own: object | None, **changes: Any
) -> OsrmConfig:
    """The configuration where a solver or a constraint may be left open; `own` statistics or None.

    Both open: the recommended one. The constraint "penalty" alone goes with PEFT's own start, any
    other with the solver "contrastive", or with the paper's where there are no own statistics. A
    solver alone goes with "project" if it looks at own statistics (their directions get lost in a
    free training), else with "init".

    Raises:
        UnknownNameError: no such solver.
        RecipeError: no such constraint.
    """
    if solver is None and constraint is None:
        return OsrmConfig.recommended(**changes)
    if solver is None:
        usual = OsrmConfig.solver if own is None else "contrastive"
        solver = PEFT_START if constraint == "penalty" else usual
    if constraint is None:
        free = solver == PEFT_START or not get_solver(solver).needs_own
        constraint = "init" if free else "project"
    return OsrmConfig(solver=solver, constraint=constraint, **changes)


def check_penalty(
    strength: float, moment: str = PENALTY_MOMENTS[0], isotropic_share: float = 0.0
) -> None:
    """Refuse what no penalty is made of.

    Raises:
        RecipeError: a strength or a share that is no number from 0 up, or no such moment.
    """
    if not 0 <= strength < math.inf:
        raise RecipeError(f"strength {strength} is not a number from 0 up: {STRENGTH:g} is usual.")
    if moment not in PENALTY_MOMENTS:
        raise unknown_name("penalty moment", moment, PENALTY_MOMENTS, error=RecipeError)
    if not 0 <= isotropic_share < math.inf:
        raise RecipeError(f"isotropic_share {isotropic_share} is not a number from 0 up.")


@_with_old_names
@dataclass(frozen=True)
class ConvertConfig:
    """How an adapter is converted; by itself what did best in our comparison (docs/convert.md).

    `subspace` says what becomes of `A`: "low_energy" moves it to where the own outputs are kept and
    the others' inputs have little effect, weighed by `balance`; "project" removes the directions
    that hold `energy_fraction` of the others' energy, or keeps `A` within the `subspace_dim` best
    ones of the `solver`; "start" replaces it by the solver's start, which is the paper's
    conversion. `refit` says what the new factors approximate: the own task's "outputs", or the
    "weights".

    Raises:
        SubspaceError: no such subspace or refit, or a figure out of its range.
        UnknownNameError: no such solver.
    """

    subspace: str = "low_energy"
    refit: str = "outputs"
    balance: float = 3.0
    ridge: float = RIDGE
    solver: str = "min_eigen"
    energy_fraction: float = CONVERT_ENERGY_FRACTION
    subspace_dim: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.subspace == "quiet":  # the name of version 0.1
            object.__setattr__(self, "subspace", SUBSPACES[0])
        if self.subspace not in SUBSPACES:
            raise unknown_name("subspace", self.subspace, SUBSPACES, error=SubspaceError)
        if self.refit not in REFITS:
            raise unknown_name("refit", self.refit, REFITS, error=SubspaceError)
        if self.subspace == SUBSPACES[0] and self.refit == "weights":
            raise SubspaceError(
                "the subspace 'low_energy' weighs outputs: leave the refit at 'outputs', or choose "
                "the subspace 'project'."
            )
        if not 0 <= self.balance < math.inf:
            raise SubspaceError(f"balance {self.balance:g} is not a number from 0 up: 1 is usual.")
        if not 0 <= self.ridge < math.inf:
            raise SubspaceError(f"ridge {self.ridge:g} is not a number from 0 up: try {RIDGE:g}.")
        self.start("token")  # checks the fields that both share

    def start(self, granularity: str) -> OsrmConfig:
        """The same choice in the words of a start."""
        return OsrmConfig(
            solver=self.solver, granularity=granularity, seed=self.seed,
            energy_fraction=self.energy_fraction, subspace_dim=self.subspace_dim,
            options=dict(self.options),
        )  # fmt: skip
