"""Write `docs/privacy.md` from `benchmarks/results/privacy.json`.

python -m benchmarks.privacy_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "privacy.md"
TEXT = ROOT / "benchmarks" / "privacy_page.md"
RESULTS = ROOT / "benchmarks" / "results" / "privacy.json"


def page() -> str:
    """The page: its text, and what was measured in the places kept for it."""
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = record["rows"]
    filled = {
        "{membership}": _membership(_of(rows, "membership")),
        "{words}": _words(_of(rows, "words")),
        "{rows}": _counts(_of(rows, "rows")),
        "{about}": (
            f"{record['model']}; {record['data']} ({record['tokens_a_text']:g} tokens a text); the "
            f"reader has {record['reader']:,} other reviews."
        ),
    }
    text = TEXT.read_text(encoding="utf-8")
    for place, said in filled.items():
        text = text.replace(place, said)
    return text


def _of(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["what"] == what]


def _sizes(rows: list[dict[str, Any]]) -> list[int]:
    return sorted({row["samples"] for row in rows})


def _by_form(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["granularity"], row["form"]), {})[row["samples"]] = row
    return found


def _membership(rows: list[dict[str, Any]]) -> str:
    sizes = _sizes(rows)
    texts = [f"{size:,} text{'s' if size > 1 else ''}" for size in sizes]
    lines = [
        f"| granularity | what is in the file | {' | '.join(texts)} |",
        "| --- | --- |" + " ---: |" * len(sizes),
    ]
    for (granularity, form), by_size in _by_form(rows).items():
        cells = [_area(by_size[size]) if size in by_size else "" for size in sizes]
        lines.append(f"| `{granularity}` | {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _area(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['auc']:.2f} ({low:.2f}–{high:.2f})"


def _words(rows: list[dict[str, Any]]) -> str:
    sizes = _sizes(rows)
    texts = [f"{size:,} text{'s' if size > 1 else ''}" for size in sizes]
    lines = [f"| what is in the file | {' | '.join(texts)} |", "| --- |" + " ---: |" * len(sizes)]
    for (_, form), by_size in _by_form(rows).items():
        cells = [_found(by_size[size]) if size in by_size else "" for size in sizes]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    priors = [
        f"{max(row['prior'] for row in rows if row['samples'] == size):.0%} / 0 %" for size in sizes
    ]
    lines.append(f"| nothing: the commonest words of other reviews | {' | '.join(priors)} |")
    return "\n".join(lines).replace("%", " %").replace("  %", " %")


def _found(row: dict[str, Any]) -> str:
    rare = "–" if row["rare"] is None else f"{row['rare']:.0%}"
    return f"{row['found']:.0%} / {rare}"


def _counts(rows: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{row['real']} of {row['rows']} ({row['samples']} text{'s' if row['samples'] > 1 else ''})"
        for row in rows
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
