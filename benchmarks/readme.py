"""Write README.md's table of the demo's four tasks from the kept rows in `results/demo`.

python -m benchmarks.readme

The rows are those of `orthomerge demo --output results/demo`.
"""

from __future__ import annotations

from pathlib import Path

from orthomerge.io.rows import read_rows
from orthomerge.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
ROWS = ROOT / "results" / "demo" / "results.jsonl"
BEFORE = "The demo's four tasks"


def page() -> str:
    """README.md with the demo's table as its rows give it."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("\n\n|", text.index(BEFORE)) + 2
    end = text.index("\n\n", start) + 1
    return text[:start] + markdown_table(read_rows(ROWS)) + text[end:]


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
