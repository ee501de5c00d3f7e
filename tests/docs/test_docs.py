"""Pages that are made from files say what the files say."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_page_on_faults_is_made_of_what_came_of_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "faults"))
    from faults import FILE, PAGE, page

    found = json.loads(FILE.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(found), "run: python tests/faults/faults.py"


def test_the_page_on_conversion_is_made_of_the_kept_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.convert import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.convert"


def test_the_table_of_the_papers_recipes_says_what_they_say():
    from orthomerge.experiment import load_recipe

    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:5] for line in page.splitlines() if line.startswith("| `paper/")]
    assert len(rows) == 6
    base = ""
    for name, told, targets, _ in rows:
        recipe, _ = load_recipe(str(ROOT / "recipes" / name.strip(" `")))
        base = base if told.strip() == "the same" else told.strip(" `")
        assert recipe.base == base
        assert recipe.adapter.targets == [t.strip() for t in targets.split(",")]


def test_the_page_of_privacy_is_made_of_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.privacy_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.privacy_page"


def test_the_table_of_the_page_on_words_is_made_of_the_kept_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.text_walk import PAGE, page

    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run: python -m benchmarks.text_walk FOLDER"
