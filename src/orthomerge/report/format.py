"""How values are written on a page: numbers, names, markers, and JSON inside a script."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from orthomerge.report.style import LIGHT, SYMBOLS, symbol
from orthomerge.report.summary import ArmSummary

_PATHS = {
    "circle": "M6 1a5 5 0 1 0 .01 0z",
    "square": "M1.5 1.5h9v9h-9z",
    "diamond": "M6 .3 11.7 6 6 11.7.3 6z",
    "triangle-up": "M6 .8 11.6 10.8H.4z",
    "triangle-down": "M6 11.2 11.6 1.2H.4z",
    "x": "M1 3.2 3.2 1 6 3.8 8.8 1 11 3.2 8.2 6 11 8.8 8.8 11 6 8.2 3.2 11 1 8.8 3.8 6z",
    "star": "m6 .4 1.6 3.6 4 .4-3 2.6.9 3.9L6 8.9l-3.5 2 .9-3.9-3-2.6 4-.4z",
    "hexagon": "M6 .3 11 3.2v5.6L6 11.7 1 8.8V3.2z",
}
assert set(_PATHS) == set(SYMBOLS)


def swatch(arm: ArmSummary) -> Markup:
    """The arm's marker in its colour, as in the figures."""
    path = _PATHS[symbol(arm.slot)]
    slot = arm.slot % len(LIGHT)
    return Markup('<svg class="swatch s{}" viewBox="0 0 12 12" aria-hidden="true">').format(
        slot
    ) + Markup('<path d="{}"/></svg>').format(path)


def code(text: str) -> Markup:
    """Text whose backquoted parts become code elements, everything escaped."""
    parts = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def moment(text: str) -> str:
    """A time of ISO 8601 to the minute, in UTC; anything else as it stands."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return (when.astimezone(UTC) if when.tzinfo else when).strftime("%Y-%m-%d %H:%M UTC")


def signed(value: float) -> str:
    """A difference of scores times 100 with its sign; one that rounds to nothing has none."""
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text


def seeds(numbers: tuple[int, ...]) -> str:
    """Seeds by name, or how many where they are many."""
    if len(numbers) <= 5:
        return ", ".join(map(str, numbers)) or "–"
    return f"{len(numbers)} ({numbers[0]} to {numbers[-1]})"


def shade(value: float | None, shares: list[float]) -> str:
    """How strongly a cell is tinted, 0 to 1 between the lowest and the highest share kept."""
    if value is None or len(shares) < 2 or max(shares) <= min(shares):
        return "0"
    return f"{(value - min(shares)) / (max(shares) - min(shares)):.3f}"


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
