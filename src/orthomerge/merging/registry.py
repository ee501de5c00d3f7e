"""The merge methods by name: a table that can be read as a list."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from orthomerge.errors import MergeError, unknown_name
from orthomerge.factors import LoraFactors

MergeFunction = Callable[..., "LoraFactors | Tensor"]
"""`function(factors, weights, *, [generator,] **options)`: one layer, pure, adapters in order."""

_F = TypeVar("_F", bound=MergeFunction)


@dataclass(frozen=True)
class MergeMethod:
    """A registered merge method and what is promised of it.

    `options` are the function's keyword-only parameters with their defaults. `symmetric`: the
    order of the adapters (each with its weight) does not matter. `random`: the function draws from
    the generator it is given. `low_rank`: with default options the result is a `LoraFactors`.
    """

    name: str
    title: str
    summary: str
    paper: str
    url: str
    function: MergeFunction
    options: Mapping[str, Any]
    symmetric: bool = True
    random: bool = False
    low_rank: bool = False


_METHODS: dict[str, MergeMethod] = {}


def register(
    *,
    name: str,
    title: str,
    summary: str,
    paper: str,
    url: str,
    symmetric: bool = True,
    random: bool = False,
    low_rank: bool = False,
) -> Callable[[_F], _F]:
    """Make a function a merge method under `name`; its keyword-only parameters are its options.

    Raises:
        MergeError: the name is taken.
    """

    def add(function: _F) -> _F:
        if name in _METHODS:
            raise MergeError(f"merging method '{name}' is already registered; choose another name.")
        parameters = inspect.signature(function).parameters.values()
        options = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name != "generator"
        }
        _METHODS[name] = MergeMethod(
            name,
            title,
            summary,
            paper,
            url,
            function,
            MappingProxyType(options),
            symmetric,
            random,
            low_rank,
        )
        return function

    return add


def get_method(name: str) -> MergeMethod:
    """The merge method of that name.

    Raises:
        UnknownNameError: no such method; the message lists them and names the nearest.
    """
    if name not in _METHODS:
        raise unknown_name("merging method", name, _METHODS)
    return _METHODS[name]


def list_methods() -> list[MergeMethod]:
    """All merge methods, in the order of registration."""
    return list(_METHODS.values())
