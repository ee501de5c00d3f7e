"""The options of a method, and a method that works through another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from orthomerge.errors import MergeError, unknown_name
from orthomerge.factors import LoraFactors
from orthomerge.merging.registry import (
    DefaultWeight,
    MergeMethod,
    PerTask,
    Truncated,
    Update,
    get_method,
)

INNER = "inner"
"""The option that names the method another one works through."""

Inner = Callable[[Sequence[LoraFactors], Sequence[float]], Update]


def check_options(method: MergeMethod, options: Mapping[str, Any]) -> None:
    """Refuse options that neither the method nor the one it works through has.

    Their values are the method's to check, on the first layer.

    Raises:
        UnknownNameError: no such inner method.
        MergeError: an option that is not known or given twice, or an inner method that cannot be
            used inside another.
    """
    if "lambda" in options and "lambda_" in options:
        raise MergeError("options 'lambda' and 'lambda_' are the same: give one of them.")
    further = {
        name: value for name, value in options.items() if parameter_of(name) not in method.options
    }
    if method.open_options and INNER in method.options:
        name = options.get(INNER, method.options[INNER])
        check_options(_usable_inside(str(name), method.name), further)
    elif further and not method.open_options:
        raise unknown_name(
            "option", next(iter(further)), method.options,
            where=f"the method '{method.name}'", error=MergeError,
        )  # fmt: skip


def known_options(method: MergeMethod, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of these options, those that the method or the one it works through has."""
    valid = set(method.options)
    if method.open_options and INNER in method.options:
        valid |= set(get_method(str(options.get(INNER, method.options[INNER]))).options)
    return {name: value for name, value in options.items() if parameter_of(name) in valid}


def inner_rule(options: Mapping[str, Any]) -> DefaultWeight:
    """The default weight of a method that has that of its inner one."""
    return get_method(str(options[INNER])).weight_rule(options)


def parameter_of(option: str) -> str:
    """The parameter that an option is passed as: lambda is a word of Python's."""
    return "lambda_" if option == "lambda" else option


def inner_method(
    name: str, outer: str, generator: torch.Generator | None, options: Mapping[str, Any]
) -> Inner:
    """The registered method `name` with its options bound, for use inside the method `outer`.

    Raises:
        UnknownNameError: no such method.
        MergeError: a method that cannot be used inside another, or an option it does not have.
    """
    method = _usable_inside(name, outer)
    check_options(method, options)
    given = {"generator": generator} if method.random else {}

    def call(factors: Sequence[LoraFactors], weights: Sequence[float]) -> Update:
        result = method.function(factors, weights, **options, **given)
        assert not isinstance(result, PerTask)
        return result.update if isinstance(result, Truncated) else result

    return call


def _usable_inside(name: str, outer: str) -> MergeMethod:
    """A method that takes the adapters alone and returns one update."""
    method = get_method(name)
    if method.needs or method.per_task or method.open_options:
        raise MergeError(
            f"option 'inner' of {outer} cannot be '{name}': give a method that takes the adapters "
            "alone and returns one update, as 'ties'."
        )
    return method
