"""Write `docs/convert.md` from the rows of the recipe convert.

python -m benchmarks.convert
"""

from __future__ import annotations

import statistics
from pathlib import Path

from orthomerge.io.rows import SINGLE, ResultRow, read_rows
from orthomerge.report.summary import percent

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "convert.md"
TEXT = ROOT / "benchmarks" / "convert_page.md"
ROWS = ROOT / "results" / "convert" / "results.jsonl"


def page() -> str:
    """The page: its text, and the table in the place of `{table}`."""
    return TEXT.read_text(encoding="utf-8").replace("{table}", table(read_rows(ROWS)))


def table(rows: list[ResultRow]) -> str:
    """Mean over tasks, then mean ± deviation over the seeds that are whole, of every arm."""
    arms = list(dict.fromkeys(r.arm for r in rows))
    merges = sorted({(r.method, r.weight or 0.0) for r in rows if r.method != SINGLE})
    tasks = len({r.task for r in rows})
    heads = ["own adapter", *(f"{method} {weight:g}" for method, weight in merges)]
    lines = [f"| arm | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for arm in arms:
        cells = [
            _cell([r for r in rows if (r.arm, r.method, r.weight or 0.0) == (arm, *what)], tasks)
            for what in [(SINGLE, 0.0), *merges]
        ]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[ResultRow], tasks: int) -> str:
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row.value)
    means = [sum(v) / len(v) for v in by_seed.values() if len(v) == tasks]
    if not means:
        return "–"
    spread = f" ± {percent(statistics.stdev(means))}" if len(means) > 1 else " (one seed)"
    return percent(statistics.mean(means)) + spread


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
