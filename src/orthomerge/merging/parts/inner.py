"""A method that works through another one: how it finds it and checks its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from orthomerge.errors import MergeError, unknown_name
from orthomerge.factors import LoraFactors
from orthomerge.merging.registry import PerTask, Truncated, Update, get_method

Inner = Callable[[Sequence[LoraFactors], Sequence[float]], Update]


def inner_method(
    name: str, outer: str, generator: torch.Generator | None, options: Mapping[str, Any]
) -> Inner:
    """The registered method `name` with its options bound, for use inside the method `outer`.

    Raises:
        UnknownNameError: no such method.
        MergeError: a method that cannot be used inside another, or an option it does not have.
    """
    method = get_method(name)
    if method.needs or method.per_task or method.open_options:
        raise MergeError(
            f"option 'inner' of {outer} cannot be '{name}': give a method that takes the adapters "
            "alone and returns one update, as 'ties'."
        )
    for option in options:
        if option not in method.options:
            raise unknown_name(
                "option", option, method.options, where=f"the method '{name}'", error=MergeError
            )
    given = {"generator": generator} if method.random else {}

    def call(factors: Sequence[LoraFactors], weights: Sequence[float]) -> Update:
        result = method.function(factors, weights, **options, **given)
        assert not isinstance(result, PerTask)
        return result.update if isinstance(result, Truncated) else result

    return call
