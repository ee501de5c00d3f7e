"""Options that no other test gives: each reaches what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call, write_task
from small_adapters import make_adapter

from orthomerge import Statistics
from orthomerge.adapters import read_adapter


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory) -> Path:
    """Two adapters, a file of rows and statistics for each."""
    folder = tmp_path_factory.mktemp("options")
    for seed, name in enumerate("ab"):
        make_adapter(folder / name, tiny_base, seed)
        write_task(folder / f"{name}.jsonl", 60, seed=seed)
        call("stats", tiny_base, "--data", folder / f"{name}.jsonl", "--samples", 20,
             "--output", folder / f"{name}.safetensors")  # fmt: skip
    return folder


def record(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_convert_is_told_its_ridge_and_share(files, tmp_path):
    out = tmp_path / "out"
    call("convert", files / "a", "--stats", files / "a.safetensors", "--others",
         files / "b.safetensors", "--subspace", "project", "--ridge", 0.25,
         "--energy-fraction", 0.5, "--output", out)  # fmt: skip
    config = record(out, "convert.json")["config"]
    assert (config["ridge"], config["energy_fraction"]) == (0.25, 0.5)


def test_options_of_version_0_1_are_read_and_say_their_new_names(files, tmp_path):
    said = call("convert", files / "a", "--stats", files / "a.safetensors", "--others",
                files / "b.safetensors", "--subspace", "project", "--share=0.5",
                "--output", tmp_path / "out")  # fmt: skip
    assert record(tmp_path / "out", "convert.json")["config"]["energy_fraction"] == 0.5
    assert "'--share' is now '--energy-fraction'" in said


def test_a_smaller_share_keeps_a_start_out_of_less(tiny_base, files, tmp_path):
    from orthomerge.adapters import read_excluded

    def kept(share: float) -> int:
        out = tmp_path / str(share)
        call("init", tiny_base, "--others", files / "b.safetensors", "--own",
             files / "a.safetensors", "--constraint", "project",
             "--energy-fraction", share, "--labels", 3,
             "--output", out)  # fmt: skip
        heads = read_adapter(out).modules
        assert any(len(t) == 3 for name, t in heads.items() if name.endswith(".weight"))
        return sum(len(rows) for rows in read_excluded(out).rows.values())

    assert 0 < kept(0.3) < kept(0.9)


def test_a_second_text_is_read_from_its_column(tiny_base, tmp_path):
    rows = [{"text": f"a b {w}", "other": f"c d {w}"} for w in "efgh"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    counts = []
    for more in ((), ("--pair-column", "other")):
        out = tmp_path / "s.safetensors"
        call("stats", tiny_base, "--data", tmp_path / "pairs.jsonl", "--output", out, *more)
        counts.append(next(iter(Statistics.load(out).moments.values())).count)
    assert counts[0] < counts[1]


def test_a_tracker_follows_a_training(tiny_base, files, tmp_path):
    pytest.importorskip("tensorboard")
    call("train", files / "a", "--task", files / "a.jsonl", "--rows", 16, "--epochs", 1,
         "--report-to", "tensorboard", "--output", tmp_path / "out")  # fmt: skip
    assert any((tmp_path / "logs").rglob("events.*"))


def test_entropy_begins_at_its_first_coefficient_on_rows_of_another_draw(files, tmp_path):
    def first(name: str, *more: object):
        call("tune", files / "a", files / "b", "--task", files / "a.jsonl", "--task",
             files / "b.jsonl", "--rows", 8, "--objective", "entropy", "--steps", 2,
             "--output", tmp_path / name, *more)  # fmt: skip
        return record(tmp_path / name, "weights.json")["trials"][0]

    plain, higher = first("plain"), first("higher", "--init", 0.7)
    assert plain["weights"] == pytest.approx([0.3, 0.3], abs=0.01)
    assert higher["weights"] == pytest.approx([0.7, 0.7], abs=0.01)
    assert first("drawn", "--data-seed", 5)["value"] != plain["value"]


def test_plan_measures_when_it_is_told_to(tiny_base, files, tmp_path, monkeypatch):
    from orthomerge.experiment import estimate, preview

    calls = []
    speed = estimate.estimated("h100")
    monkeypatch.setattr(preview, "measured", lambda: calls.append(1) or speed)
    call("plan", "demo", "--measure")
    call("run", "demo", "--dry-run", "--speed", "measure", "--output", tmp_path)
    assert calls == [1, 1]


def test_the_board_listens_where_it_is_told(tmp_path, monkeypatch):
    import orthomerge.board

    given = []
    monkeypatch.setattr(orthomerge.board, "serve", lambda *told: given.extend(told[:2]))
    call("report", tmp_path, "--serve", "--port", 9123)
    assert given == [tmp_path, 9123]


def test_run_hands_retries_on(tmp_path, monkeypatch):
    from orthomerge.cli import run

    given = []
    monkeypatch.setattr(run, "_run", lambda *_, **how: given.append(how["retries"]))
    call("run", "demo", "--output", tmp_path, "--retries", 5)
    assert given == [5]
