"""What `orthomerge stats` says of the moments it holds, a line for inputs alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.statistics import Statistics


def kinds_of(statistics: Statistics) -> dict[str, dict[str, Any]]:
    """The representation that each input got."""
    return {
        lead: {
            "kind": moment.kind,
            "width": moment.dim,
            "rows": moment.count,
            "kept": None if moment.factor is None else len(moment.factor),
            "exact": moment.exact,
        }
        for lead, moment in statistics.moments.items()
    }


def grouped(kinds: dict[str, dict[str, Any]], statistics: Statistics) -> list[str]:
    """A line for all inputs of one width and representation."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for lead, item in kinds.items():
        groups[item["kind"], item["width"]].append(lead)
    lines: list[str] = []
    for (kind, width), leads in groups.items():
        number = f"{len(leads)} input{'s' if len(leads) > 1 else ''}"
        lines.append(
            f"  {kind}{_how_many(kind, kinds[leads[0]])}: {number} of width "
            f"{width}, {', '.join(_patterns(leads, statistics))}"
        )
    return lines


def _how_many(kind: str, first: dict[str, Any]) -> str:
    if kind == "rows":
        drawn = "" if first["exact"] else f", drawn from {first['rows']:,}"
        return f" ({first['kept']:,} kept{drawn})"
    return f" ({first['kept']} directions)" if kind == "sketch" else ""


def _patterns(leads: Sequence[str], statistics: Statistics) -> list[str]:
    """The layers of inputs, the same in every block written once."""
    import re

    from orthomerge.statistics import layer_label

    labels = [
        layer_label([layer for layer, owner in statistics.layers.items() if owner == lead])
        for lead in leads
    ]
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", label) for label in labels))


def unreached(statistics: Statistics) -> list[str]:
    """A line where experts were reached by no token."""
    silent = [lead for lead, moment in statistics.moments.items() if not moment.trace]
    if not silent:
        return []
    return [
        f"  {len(silent)} of them were reached by no token ('{silent[0]}'): their moment is zero."
    ]


def sizes(statistics: Statistics) -> str:
    """How much is in the file."""
    return (
        f"{len(statistics.moments)} distinct inputs of {len(statistics.layers)} layers, "
        f"{statistics.meta.samples} samples"
    )


def published_line(directions: int, noise: float) -> str:
    """What was left of statistics that were published."""
    return (
        f"  published: the top {directions} directions, noise {noise:g}; this is not "
        "differential privacy."
    )
