"""Layers cut in depth into groups, each found by one regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from orthomerge.errors import MergeError

# A part of a layer's name that is not a number, and the start of a name up to its first number.
_WORD = r"[^.]*[^.0-9][^.]*"
_START = rf"^(?:{_WORD}\.)*"


def depth(layer: str) -> int | None:
    """The first number among the parts of a layer's name, its block; None where there is none."""
    return next((int(part) for part in layer.split(".") if re.fullmatch("[0-9]+", part)), None)


def depth_groups(layers: Sequence[str], count: int) -> list[str]:
    """`count` regular expressions, each finding the layers of neighbouring blocks (`re.search`).

    Every layer is found by exactly one; groups differ by one block at most. The encoder and the
    decoder of one depth go together, and layers outside the blocks go with the first.

    Raises:
        MergeError: fewer than one group, or fewer blocks than groups.
    """
    depths = sorted({d for layer in layers if (d := depth(layer)) is not None})
    if count < 1 or count > max(len(depths), 1):
        raise MergeError(
            f"{count} groups of layers: the adapters have {len(depths)} blocks in depth, so ask "
            f"for 1 to {max(len(depths), 1)}."
        )
    if count == 1:
        return ["^"]
    edges = [round(i * len(depths) / count) for i in range(count + 1)]
    found = [rf"{_START}(?:{'|'.join(map(str, depths[a:b]))})(?:\.|$)" for a, b in pairwise(edges)]
    if any(depth(layer) is None for layer in layers):
        found[0] = rf"{found[0]}|^{_WORD}(?:\.{_WORD})*$"
    return found
