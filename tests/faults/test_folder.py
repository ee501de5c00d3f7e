"""What watches a run's folder sees a chunk that is made again, and excuses only a broken one."""

from __future__ import annotations

import json

from folder import Stands


def adapter(top, task, text):
    path = top / "adapters" / task / "adapter_model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("new").write_text(text)
    return path.with_name("new").rename(path)


def look(stands, top):
    return stands.look(top, damaged=False)


def test_a_broken_piece_may_be_made_again_once_and_a_whole_one_never(tmp_path):
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"event": "done", "job": "x"}) + "\n")
    one, _ = adapter(tmp_path, "a", "1"), adapter(tmp_path, "b", "1")
    stands = Stands([])
    assert look(stands, tmp_path) == {}
    stands.excuse(tmp_path, one)
    one.write_text("")  # the same file, cut
    assert stands.look(tmp_path, damaged=True) == {}  # a kill came before it was made again
    assert look(stands, tmp_path) == {}
    adapter(tmp_path, "a", "2")
    assert look(stands, tmp_path) == {}
    adapter(tmp_path, "b", "2")
    assert list(look(stands, tmp_path)) == ["lost jobs"]
    adapter(tmp_path, "a", "3")
    assert list(look(stands, tmp_path)) == ["lost jobs"]
