"""Pages that are made from files say what the files say."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_benchmark_page_is_made_of_the_kept_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.table"


def test_the_page_of_methods_is_made_of_the_kept_rows_and_the_registry(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.methods import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.methods"
