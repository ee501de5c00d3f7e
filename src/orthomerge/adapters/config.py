"""What an orthogonal start is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orthomerge.errors import RecipeError, unknown_name
from orthomerge.subspace import get_solver

CONSTRAINTS = ("init", "freeze")


@dataclass(frozen=True)
class OsrmConfig:
    """How to choose `A` and what training may do with it.

    `solver` names a function of `orthomerge.subspace`, `options` go to it; `granularity` is the
    one the statistics must have; `constraint` is "init" (the paper: only the start) or "freeze"
    (`A` is held); `weights` are the others' weights in `S_other`, equal when None.

    Raises:
        UnknownNameError: no such solver.
        RecipeError: no such constraint.
    """

    solver: str = "min_eigen"
    granularity: str = "token"
    constraint: str = "init"
    seed: int = 0
    weights: tuple[float, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        get_solver(self.solver)
        if self.constraint not in CONSTRAINTS:
            raise unknown_name("constraint", self.constraint, CONSTRAINTS, error=RecipeError)
