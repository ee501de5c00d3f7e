"""The solvers by name: a table that can be read as a list."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthomerge.errors import StatisticsError, SubspaceError, unknown_name
from orthomerge.moments import Moment, as_moment, leave_one_out
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
        options = self.check_options(options)
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

    def for_all(
        self,
        moments: Sequence[Moment],
        ranks: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Subspace]:
        """A solution for each task against all the others; their moments are combined once.

        `joint` solves for all tasks together; any other solver gives what it gives one by one.

        Raises:
            SubspaceError: what solving one by one raises, or not one rank and one seed per task.
        """
        options = self.check_options(options)
        shares = [1.0] * len(moments) if weights is None else list(weights)
        draws = list(range(len(moments))) if seeds is None else list(seeds)
        if not len(ranks) == len(draws) == len(shares) == len(moments):
            raise SubspaceError(
                f"{len(moments)} tasks have {len(ranks)} ranks, {len(draws)} seeds and "
                f"{len(shares)} weights: give one per task."
            )
        function = _TOGETHER.get(self.name)
        if function is not None:
            for moment, rank in zip(moments, ranks, strict=True):
                check_problem(moment, rank, None)
            return function(moments, ranks, weights=shares, seeds=draws, **options)
        others = leave_one_out(moments, shares)
        return [
            self(other, rank, own=own, seed=draw, **options)
            for other, own, rank, draw in zip(others, moments, ranks, draws, strict=True)
        ]

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, whole numbers made floats where the solver wants floats.

        Raises:
            SubspaceError: one it does not have; the message names the nearest.
        """
        for option in options:
            if option not in self.options:
                kind = f"option of the solver '{self.name}'"
                raise unknown_name(kind, option, self.options, error=SubspaceError)
        return {
            name: float(value)
            if isinstance(self.options[name], float) and type(value) is int
            else value
            for name, value in options.items()
        }


_SOLVERS: dict[str, Solver] = {}
_TOGETHER: dict[str, Callable[..., list[Subspace]]] = {}


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


def together(name: str):
    """Make a function the way `Solver.for_all` solves for all tasks at once.

    It takes moments, ranks, weights and seeds of all tasks and the solver's options. For solvers
    whose tasks depend on each other, as those of `joint`: what merely shares work is not worth a
    second way, since a team starts its own task alone.
    """

    def add(function: Callable[..., list[Subspace]]):
        _TOGETHER[name] = function
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
