"""Pages that are made from files say what the files say."""

from __future__ import annotations

import json
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


def test_the_page_of_diagnosis_and_the_quoted_evidence_are_made_of_the_kept_lines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import FILE, PAGE, page

    found = json.loads(FILE.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(found, text), "run: python -m benchmarks.evidence"


def test_the_page_on_conversion_is_made_of_the_kept_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.convert import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.convert"
