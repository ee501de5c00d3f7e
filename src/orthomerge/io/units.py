"""Sizes in bytes, as a person writes and reads them."""

from __future__ import annotations

import re

from orthomerge.errors import RecipeError

_UNITS = {"": 1, "B": 1} | {
    name: base ** (power + 1)
    for base, names in ((1000, ("KB", "MB", "GB", "TB")), (1024, ("KIB", "MIB", "GIB", "TIB")))
    for power, name in enumerate(names)
}


def parse_size(text: str) -> int:
    """Bytes from a number with a unit, as in `512MiB`; a bare number is bytes.

    Raises:
        RecipeError: something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise RecipeError(f"size '{text}' is not a number with a unit, as in 512MiB or 2GiB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def human_size(size: float) -> str:
    """Bytes as a person reads them: three digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
