"""Kept rows, finished artifacts and records of merges stay what they are, whatever moves in `src`.

The tables were written by the code as it was before its second edition. A change of one that is
meant is written by `write_pins.py` and listed in CHANGELOG.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_keys import digest, kept_keys, keys_by_arm
from tiny_merges import MERGES, merged

from orthomerge.io.rows import read_rows

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
PINS = json.loads((HERE / "keys.json").read_text(encoding="utf-8"))
RECORDS = json.loads((HERE / "merges.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PINS["inputs of kept results"])
def test_the_rows_that_are_kept_are_those_that_their_recipe_asks_for(name):
    rows = {row.key: row for row in read_rows(RESULTS / name / "results.jsonl")}
    inputs = PINS["inputs of kept results"][name]
    asked = kept_keys(RESULTS / name / "recipe.yaml", inputs["base"], inputs["data"], rows)
    assert sorted(asked) == sorted(rows)


@pytest.mark.parametrize("name", PINS["keys by arm"])
def test_artifacts_and_rows_of_every_recipe_have_the_keys_that_they_had(name):
    found = {
        arm: {kind: digest(names) for kind, names in kinds.items() if names}
        for arm, kinds in keys_by_arm(f"recipes/{name}").items()
    }
    for arm, kinds in PINS["keys by arm"][name].items():
        assert found[arm] == kinds, arm


@pytest.mark.parametrize("name", MERGES)
def test_the_record_of_a_merge_is_what_it_was(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, rows = merged(tmp_path, name)
    assert text == json.dumps(RECORDS[name]["merge.json"], indent=2) + "\n"
    assert rows == pytest.approx(RECORDS[name]["rows"], abs=2e-4)
