"""A few hundred broken inputs of every kind; the page says what the long run found."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from orthomerge.adapters.verify import verify
from orthomerge.errors import AdapterError, OrthomergeError
from orthomerge.files import fingerprint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import fuzzing


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> list[fuzzing.Target]:
    return fuzzing.targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("place", range(fuzzing.TARGETS))
def test_broken_inputs_are_refused_in_a_sentence(targets, place):
    found = fuzzing.fuzz(targets[place], 200, seed=11)
    assert found["problems"] == {}
    assert found["accepted"] + found["refused"] == 200
    assert found["refused"] > 20  # the mutator breaks something
    assert found["accepted"] > 0  # and not everything


def test_the_fuzzer_sees_what_is_not_caught():
    def once(rng):
        raise KeyError(rng.random() < 2)

    assert fuzzing.fuzz(fuzzing.Target("broken", 1.0, once), 3)["uncaught"] == 3


def test_every_kind_is_a_target(targets):
    assert len(targets) == fuzzing.TARGETS
    assert sum(t.share for t in targets) == pytest.approx(1)


def test_the_page_holds_the_table_of_the_last_long_run():
    assert fuzzing.page() in fuzzing.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("place, number", [(4, 9217), (5, 931)])
def test_what_came_out_uncaught_once_is_refused(targets, place, number):
    """Inputs of the long run, by their numbers."""
    with pytest.raises(OrthomergeError):
        targets[place].once(random.Random(f"0 {targets[place].name} {number}"))


# What the fuzzer found ---------------------------------------------------------------------------


def test_a_task_type_that_peft_has_not_is_refused_before_anything_is_written(tmp_path):
    from hostile_files import write_adapter

    from orthomerge import merge_adapters

    folder = write_adapter(tmp_path / "a", task_type="\0")
    with pytest.raises(AdapterError, match="'task_type'"):
        merge_adapters([folder], output=tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{"layer_weights": "x"}, {"statistics": ["x"]}, {"seed": float("inf")}]
)
def test_a_record_of_other_types_cannot_be_done_again(tmp_path, changes):
    from hostile_files import write_adapter

    from orthomerge import merge_adapters

    folder = write_adapter(tmp_path / "a")
    merge_adapters([folder], output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    record = {k: v for k, v in record.items() if k != "sha256"} | changes
    (tmp_path / "out" / "merge.json").write_text(
        json.dumps({**record, "sha256": fingerprint(record)})
    )
    with pytest.raises(AdapterError, match="how to merge again"):
        verify(tmp_path / "out", redo=True, adapters=[folder])
