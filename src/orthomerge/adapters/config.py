"""What an orthogonal start is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orthomerge.errors import RecipeError, unknown_name
from orthomerge.subspace import get_solver

CONSTRAINTS = ("init", "freeze", "project")
FROZEN_B = "freeze_B"
"""The control that holds `B` instead: of a training, not of an orthogonal start."""
SHARE = 0.9
"""The share of the others' energy that `project` keeps A out of, unless said otherwise."""


@dataclass(frozen=True)
class OsrmConfig:
    """How to choose `A` and what training may do with it; by itself the paper's way.

    `solver` names a function of `orthomerge.subspace`, `options` go to it; `granularity` is the
    one the statistics must have; `constraint` is "init" (the paper: only the start), "freeze" (`A`
    is held) or "project" (`A` trains, but never into the directions that hold `share` of the
    others' energy or, with `room`, never out of the `room` best directions of the solver);
    `weights` are the others' weights in `S_other`, equal when None.

    Raises:
        UnknownNameError: no such solver.
        SubspaceError: an option the solver does not have.
        RecipeError: no such constraint, a share outside (0, 1), or a room below 1.
    """

    solver: str = "min_eigen"
    granularity: str = "token"
    constraint: str = "init"
    share: float = SHARE
    room: int | None = None
    seed: int = 0
    weights: tuple[float, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def recommended(cls, **changes: Any) -> OsrmConfig:
        """What kept most of a merge in our comparison (LOG.md): `contrastive`, and `project`.

        It needs the task's own statistics, and a training that projects (`Projection`).
        """
        return cls(**{"solver": "contrastive", "constraint": "project", **changes})

    def __post_init__(self) -> None:
        get_solver(self.solver).check_options(self.options)
        if self.constraint not in CONSTRAINTS:
            raise unknown_name("constraint", self.constraint, CONSTRAINTS, error=RecipeError)
        if not 0 < self.share < 1:
            raise RecipeError(f"share {self.share} is not between 0 and 1: {SHARE} is the default.")
        if self.room is not None and self.room < 1:
            raise RecipeError(f"room {self.room} is not a number of directions: 32 is a start.")
