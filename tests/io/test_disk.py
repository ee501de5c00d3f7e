"""Temporary folders, swaps and lines, where a writer was killed or stands beside another."""

from __future__ import annotations

import pytest

from orthomerge.errors import OrthomergeError
from orthomerge.io import disk
from orthomerge.io.disk import Holder, put, sweep
from orthomerge.io.files import append_lines, atomic_path, write_text


def leave(target):
    """What a killed writer of `target` leaves: a holder, its lock free."""
    holder = Holder(target)
    holder._lock.release()
    (holder.folder / target.name).write_text("half", encoding="utf-8")
    return holder.folder


def test_the_next_writer_clears_what_a_killed_one_left_and_no_living_one(tmp_path):
    target = tmp_path / "x[1]"
    dead, living = leave(target), Holder(target)
    empty = tmp_path / ".x[1].part-zzzz"
    empty.mkdir()
    write_text(target, "whole")
    assert not dead.exists() and not empty.exists() and living.folder.exists()
    sweep(tmp_path)
    assert living.folder.exists()
    living.close()
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced_whole_in_one_step_or_in_two(tmp_path, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(disk, "_swapped", lambda path, target: False)
    target = tmp_path / "out"
    for text in ("one", "two"):
        with atomic_path(target, replace=True) as folder:
            folder.mkdir()
            (folder / text).touch()
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_between_the_two_steps_puts_the_old_folder_back(tmp_path, monkeypatch):
    path, target = tmp_path / "h" / "out", tmp_path / "out"
    path.mkdir(parents=True)
    target.mkdir()
    (target / "old").touch()
    replace = type(path).replace

    def fails(self, to):
        if self == path:
            raise KeyboardInterrupt
        return replace(self, to)

    monkeypatch.setattr(disk, "_swapped", lambda path, target: False)
    monkeypatch.setattr(type(path), "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        put(path, target)
    assert (target / "old").exists()


def test_what_a_kill_between_the_two_steps_took_away_is_put_back(tmp_path):
    target = tmp_path / "out"
    holder = leave(target)
    (holder / "out.old").mkdir()
    (holder / "out.old" / "old").touch()
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "old").exists()


def test_a_target_of_the_other_kind_is_one_sentence(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OrthomergeError, match=r"cannot write .*choose another output path"):
        write_text(tmp_path / "folder", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("left", "kept"), [(b'{"a": "\xc3', b""), (b'{"a": 1}', b'{"a": 1}\n'), (b'{"a"', b"")]
)
def test_a_line_that_a_kill_left_is_kept_if_it_is_whole(tmp_path, left, kept):
    path = tmp_path / "lines"
    path.write_bytes(b'{"b": 0}\n' + left)
    append_lines(path, ['{"c": 2}'])
    assert path.read_bytes() == b'{"b": 0}\n' + kept + b'{"c": 2}\n'
