"""The solvers by name: a table that can be read as a list."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthomerge.errors import StatisticsError, SubspaceError, unknown_name
from orthomerge.moments import Moment, as_moment
from orthomerge.subspace._types import Cost, Subspace, check_problem


@dataclass(frozen=True)
class Solver:
    """A registered solver: `function(other, rank, *, own, seed, **options) -> Subspace`.

    `needs_own` says that it cannot do without the task's own statistics, `joint` that it also
    takes the rows of other adapters (`taken`) and can solve all tasks at once.
    """

    name: str
    title: str
    paper: str
    needs_own: bool
    joint: bool
    function: Callable[..., Subspace]
    options: Mapping[str, Any]

    def __call__(
        self,
        other: Moment | Tensor,
        rank: int,
        *,
        own: Moment | Tensor | None = None,
        seed: int = 0,
        taken: Tensor | None = None,
        **options: Any,
    ) -> Subspace:
        """Solve; a square tensor is taken as a second moment.

        `taken: [m, d_in]` are rows that other adapters' `A` hold, for a `joint` solver.

        Raises:
            SubspaceError: an option the solver does not have (the message names the nearest), or
                a problem that cannot be solved.
        """
        self.check_options(options)
        try:
            features = as_moment(other)
            mine = None if own is None else as_moment(own)
        except StatisticsError as problem:
            raise SubspaceError(str(problem)) from problem
        check_problem(features, rank, mine)
        if taken is not None:
            if not self.joint:
                raise SubspaceError(
                    f"the solver '{self.name}' does not look at other adapters: use 'joint'."
                )
            options["taken"] = taken
        began = time.perf_counter()
        found = self.function(features, rank, own=mine, seed=seed, **options)
        return found._replace(cost=Cost(time.perf_counter() - began, found.cost.how))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options the solver does not have.

        Raises:
            SubspaceError: one it does not have; the message names the nearest.
        """
        for option in options:
            if option not in self.options:
                kind = f"option of the solver '{self.name}'"
                raise unknown_name(kind, option, self.options, error=SubspaceError)


_SOLVERS: dict[str, Solver] = {}


def register(name: str, *, title: str, paper: str, needs_own: bool = False, joint: bool = False):
    """Make a function a solver under `name`; its further keyword-only parameters are options."""

    def add(function: Callable[..., Subspace]) -> Callable[..., Subspace]:
        parameters = inspect.signature(function).parameters.values()
        options = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in ("own", "seed", "taken")
        }
        _SOLVERS[name] = Solver(name, title, paper, needs_own, joint, function, options)
        return function

    return add


def get_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UnknownNameError: no such solver; the message lists them and names the nearest.
    """
    if name not in _SOLVERS:
        raise unknown_name("solver", name, _SOLVERS)
    return _SOLVERS[name]


def list_solvers() -> list[Solver]:
    """All solvers, in the order of registration."""
    return list(_SOLVERS.values())
