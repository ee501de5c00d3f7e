"""docs/methods.md says what the figures carry: hand-made rows, sentences worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_methods_table import both, merge, single

from orthomerge.io.rows import append_rows
from orthomerge.merging import list_methods

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.methods import page

    return page


def study(clear: bool):
    """Two seeds; ties .10 and .12 above the sum, or .10 above and .02 below it."""
    rows = []
    for seed, total in ((0, 0.50), (1, 0.54)):
        rows += single("default", seed, 0.8, 0.8)
        ones = [(1.0, (0.5, 0.5))]
        rows += merge("default", "task_arithmetic", seed, (total, total), selection=ones)
        ties = total + (0.10 if seed == 0 else 0.12 if clear else -0.02)
        rows += merge("default", "ties", seed, (ties, ties), selection=ones)
        low = total - 0.2
        rows += merge("default", "wudi", seed, (low, low), selection=ones)
        rows += merge("default", "regmean", seed, (total, total), selection=ones)
        rows += both("default", 0.72, 0.72, method="emr", weight=1.0, seed=seed)
    return rows


def write(tmp_path, rows):
    append_rows(tmp_path / "results.jsonl", rows)
    return tmp_path / "results.jsonl", tmp_path / "none.json"


def test_a_difference_that_the_seeds_carry_is_claimed(page, tmp_path):
    text = page(*write(tmp_path, study(clear=True)))
    assert "plain sum (`task_arithmetic`) scores 52.0 ± 2.8 (65 %) at weight 1" in text
    assert "`ties` scores highest: 63.0 ± 4.2 (79 %) at weight 1; 11.0 points above" in text
    assert "in each of 2 seeds and by more than its spread" in text
    said = "`ties` is above it and `wudi` is below it; `regmean` is not distinguishable from it."
    assert said in text
    assert "`regmean` scores highest: 52.0 ± 2.8" in text
    assert "`emr` scores 72.0 ± 0.0 (90 %)" in text


def test_a_difference_that_the_seeds_do_not_carry_is_not(page, tmp_path):
    text = page(*write(tmp_path, study(clear=False)))
    assert "4.0 points above the plain sum, a difference that 2 seeds do not carry" in text
    assert "none is above it and `wudi` is below it" in text


def test_one_seed_carries_no_claim(page, tmp_path):
    text = page(*write(tmp_path, [r for r in study(clear=True) if r.seed == 0]))
    assert "10.0 points above the plain sum on one seed, which carries no claim" in text
    assert "below it" not in text


def test_a_method_without_all_seeds_is_in_the_table_and_in_no_sentence(page, tmp_path):
    rows = [r for r in study(clear=True) if not (r.method == "ties" and r.seed == 1)]
    text = page(*write(tmp_path, rows))
    assert "| ties | 60.0 (75 %), 1 of 2 seeds |" in text
    assert "`ties` scores highest" not in text


def test_times_stand_in_the_table_and_in_the_sections(page, tmp_path):
    rows, times = write(tmp_path, study(clear=True))
    measured = [{"method": "ties", "seconds": 1.234, "extra_mib": 32.4}]
    times.write_text(json.dumps({"machine": "two cores", "adapters": 8, "rows": measured}))
    text = page(rows, times)
    assert "(79 ± 5 %) at 1 | 1.2 | 32 |" in text
    assert "(measured: 1.2 s, 32 MiB)" in text
    assert "one layer (8 adapters; two cores)" in text


def test_without_rows_the_page_says_so_and_every_method_has_its_section(page, tmp_path):
    text = page(tmp_path / "none.jsonl", tmp_path / "none.json")
    assert "has no rows here yet" in text
    assert "have not been measured yet" in text
    for method in list_methods():
        assert text.count(f"### `{method.name}`: ") == 1
        section = text.split(f"### `{method.name}`: ")[1].split("###")[0]
        assert method.url in section
        assert "- Cost a layer: O(" in section
