from __future__ import annotations

import dataclasses

import pytest

from orthomerge.errors import OrthomergeError, unknown_name
from orthomerge.io.files import atomic_path, derive_seed, fingerprint, write_text
from orthomerge.io.rows import ResultRow, append_rows, read_rows


def row(key: str, value: float = 0.5) -> ResultRow:
    return ResultRow(
        task="t", arm="a", start="default", solver=None, granularity=None, constraint="init",
        learning_rate=1e-3, method="single", weight=None, metric="accuracy", value=value, seed=0,
        n=10, split="test", key=key,
    )  # fmt: skip


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row("1"), row("2", 0.25)]
    append_rows(tmp_path / "r.jsonl", rows[:1])
    append_rows(tmp_path / "r.jsonl", rows[1:])
    assert read_rows(tmp_path / "r.jsonl") == rows


def test_the_later_row_of_one_key_wins(tmp_path):
    append_rows(tmp_path / "r.jsonl", [row("1", 0.1), row("1", 0.9)])
    assert [r.value for r in read_rows(tmp_path / "r.jsonl")] == [0.9]


def test_a_line_cut_by_a_kill_is_dropped_and_the_next_row_is_not_lost(tmp_path):
    path = tmp_path / "r.jsonl"
    append_rows(path, [row("1")])
    with path.open("a") as stream:
        stream.write(row("2").to_json()[:40])
    assert [r.key for r in read_rows(path)] == ["1"]
    append_rows(path, [row("3")])
    assert [r.key for r in read_rows(path)] == ["1", "3"]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("{nonsense\n" + row("1").to_json() + "\n")
    with pytest.raises(OrthomergeError, match="line 1 of"):
        read_rows(path)


def test_unknown_fields_of_a_newer_version_are_ignored(tmp_path):
    import json

    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**dataclasses.asdict(row("1")), "later": 1}) + "\n")
    assert read_rows(path) == [row("1")]


def test_nothing_is_left_behind_when_a_write_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "x") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_an_older_one_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_path(tmp_path / "d", replace=True) as path:
            path.mkdir()
            (path / content).write_text(content)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["new"]


def test_files_can_be_read_by_others_as_the_umask_says(tmp_path):
    with atomic_path(tmp_path / "f") as path:
        path.touch(mode=0o600)
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "f").stat().st_mode == plain.stat().st_mode


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OrthomergeError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")


def test_fingerprints_ignore_key_order_and_seeds_are_their_own():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    seeds = {
        derive_seed(0, "a"),
        derive_seed(1, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", "b"),
    }
    assert len(seeds) == 4
    assert all(0 <= s < 2**31 for s in seeds)


def test_an_unknown_name_names_the_nearest_and_the_valid_ones():
    message = str(unknown_name("method", "tise", ["ties", "linear"]))
    assert "did you mean 'ties'" in message
    assert "linear" in message
