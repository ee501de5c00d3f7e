"""The weight of a merge where none is given, and why it is that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from orthomerge.adapters.files import Adapter
from orthomerge.io.documents import is_object, object_in
from orthomerge.io.names import CONVERT, START, TRAINING
from orthomerge.merging import MergeConfig

MADE_TO_SUM = ("freeze", "project", "penalty")
"""Constraints under which an adapter is trained to be summed at weight 1."""
# A record's file, where in it the way of making is said, and the ways that are for sums.
_SAID = (
    (TRAINING, ("constraint",), MADE_TO_SUM),
    (CONVERT, ("config", "subspace"), ("low_energy", "quiet")),
    (START, ("config", "constraint"), MADE_TO_SUM),
)


class Weighed(NamedTuple):
    """A merge whose weights are numbers; `reason` says why, and is empty where they were given."""

    config: MergeConfig
    reason: str


def weighed(config: MergeConfig, adapters: Sequence[Adapter]) -> Weighed:
    """The merge with its default weight in it, where it has none.

    The method's rule (`MergeConfig.weight_rule`) holds for adapters that were trained the usual
    way. Those whose records say that they were trained or converted to be summed have weight 1
    where the rule is that of a sum.
    """
    if config.weights is not None:
        return Weighed(config, "")
    count, rule = len(adapters), config.weight_rule
    ways = [made_to_sum(adapter) for adapter in adapters]
    if count == 1:
        weight, reason = 1.0, "1, as for any single adapter"
    elif rule == "1/√N" and all(ways):
        said = " or ".join(dict.fromkeys(way for way in ways if way))
        weight, reason = 1.0, f"1, as every adapter was made to be summed ({said})"
    elif rule == "1":
        weight = 1.0
        reason = f"1, as '{config.method}' keeps the size of one update by itself"
    else:
        weight = config.spread(count)[0]
        usual = "as not every adapter has a record that says it was made to be summed"
        why = usual if rule == "1/√N" else f"as '{config.method}' adds up the sizes of the updates"
        reason = f"{rule.replace('N', str(count))} = {weight:.3g}, {why}"
    return Weighed(replace(config, weights=weight), reason)


def made_to_sum(adapter: Adapter) -> str | None:
    """How an adapter was made to be summed, as the record in its folder says it, else None."""
    if adapter.path is None:
        return None
    for file, keys, ways in _SAID:
        found = _read(adapter.path / file, keys)
        if found is not None:
            return found if found in ways else None
    return None


def _read(file: Path, keys: Sequence[str]) -> str | None:
    """What a record says under `keys`; None where it does not, or is another program's file."""
    value: object = object_in(file)
    for key in keys:
        value = value.get(key) if is_object(value) else None
    return value if isinstance(value, str) else None
