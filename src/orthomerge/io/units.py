"""Sizes in bytes and spans of time, as a person writes and reads them."""

from __future__ import annotations

import re

from orthomerge.errors import OrthomergeError, RecipeError

_UNITS = {"": 1, "B": 1} | {
    name: base ** (power + 1)
    for base, names in ((1000, ("KB", "MB", "GB", "TB")), (1024, ("KIB", "MIB", "GIB", "TIB")))
    for power, name in enumerate(names)
}


def parse_size(text: str, error: type[OrthomergeError] = RecipeError) -> int:
    """Bytes from a number with a unit, as in `512MiB`; a bare number is bytes.

    Raises:
        error: something else, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 1:
        raise error(f"size '{text}' is not a number with a unit, as in 512MiB or 2GiB.")
    return size


def human_size(size: float) -> str:
    """Bytes as a person reads them: three digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def human_duration(seconds: float) -> str:
    """A span of time as a person reads it: `45 s`, `3 min 05 s`, `25 min`, `2 h 05 min`."""
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole} s" if whole or not seconds else "under 1 s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"
