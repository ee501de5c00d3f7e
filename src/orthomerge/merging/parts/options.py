"""Checks of option values: one sentence that names the option and the value."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orthomerge.errors import MergeError


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_fraction(name: str, value: float, *, zero: bool = False) -> None:
    """A number in (0, 1], or in [0, 1] where `zero` is allowed.

    Raises:
        MergeError: it is not.
    """
    if not _is_number(value) or not (0 <= value <= 1) or (value == 0 and not zero):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise MergeError(f"option '{name}' must be a number in {interval}, not {value!r}.")


def check_number(name: str, value: float) -> None:
    """A finite number.

    Raises:
        MergeError: it is not.
    """
    if not _is_number(value):
        raise MergeError(f"option '{name}' must be a finite number, not {value!r}.")


def check_positive(name: str, value: float) -> None:
    """A finite number above 0.

    Raises:
        MergeError: it is not.
    """
    if not _is_number(value) or value <= 0:
        raise MergeError(f"option '{name}' must be a number above 0, not {value!r}.")


def check_rank(name: str, value: object, *, none: bool = True) -> None:
    """A whole number of at least 1, or None where that is allowed.

    Raises:
        MergeError: it is neither.
    """
    if value is None and none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MergeError(f"option '{name}' must be a whole number of at least 1, not {value!r}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of `choices`.

    Raises:
        MergeError: it is not.
    """
    if value not in choices:
        valid = ", ".join(f"'{choice}'" for choice in choices)
        raise MergeError(f"option '{name}' must be one of {valid}, not {value!r}.")


def check_bool(name: str, value: object) -> None:
    """True or False.

    Raises:
        MergeError: it is neither.
    """
    if not isinstance(value, bool):
        raise MergeError(f"option '{name}' must be true or false, not {value!r}.")


class LayerProblem(MergeError):
    """What is wrong with the layer at hand; `merge_layers` adds the layer's name."""
