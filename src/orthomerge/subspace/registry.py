"""The solvers by name: a table that can be read as a list."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orthomerge.errors import SubspaceError, unknown_name
from orthomerge.subspace._types import Subspace


@dataclass(frozen=True)
class Solver:
    """A registered solver: `function(other, rank, *, own, seed, **options) -> Subspace`."""

    name: str
    title: str
    paper: str
    needs_own: bool
    function: Callable[..., Subspace]
    options: Mapping[str, Any]

    def __call__(self, other, rank: int, *, own=None, seed: int = 0, **options) -> Subspace:
        """Solve; an option the solver does not have is an error that names the nearest."""
        for option in options:
            if option not in self.options:
                raise unknown_name(
                    f"option of the solver '{self.name}'",
                    option,
                    self.options,
                    error=SubspaceError,
                )
        return self.function(other, rank, own=own, seed=seed, **options)


_SOLVERS: dict[str, Solver] = {}


def register(name: str, *, title: str, paper: str, needs_own: bool = False):
    """Make a function a solver under `name`; its further keyword-only parameters are options."""

    def add(function: Callable[..., Subspace]) -> Callable[..., Subspace]:
        parameters = inspect.signature(function).parameters.values()
        options = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in ("own", "seed")
        }
        _SOLVERS[name] = Solver(name, title, paper, needs_own, function, options)
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
