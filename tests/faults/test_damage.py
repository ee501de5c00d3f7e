"""Files of a finished run that were cut or lost are made again; its tables are what they were."""

from __future__ import annotations

import os
import shutil

import pytest
from tiny_recipe import execute, make_recipe, untimed

from orthomerge.experiment.steps import train

TABLES = ("interference.jsonl", "spectra.jsonl", "subspaces.jsonl", "training.jsonl")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def test_damaged_pieces_are_made_again_also_when_a_kill_comes_between(
    tiny_base, tmp_path, monkeypatch
):
    recipe = make_recipe(tmp_path / "tasks", tiny_base)
    recipe["arms"] = {"osrm": {"start": "min_eigen"}}
    recipe["merges"] = [{"method": "fisher"}]
    whole, output = tmp_path / "whole", tmp_path / "run"
    rows = execute(recipe, whole)
    shutil.copytree(whole, output)
    adapter = next((output / "adapters").rglob("training.json"))
    adapter.unlink()  # with its weights whole, so that only the losses tell
    cut(next((output / "stats").iterdir()))
    cut(next((output / "fisher").rglob("*.safetensors")))
    cut(next((output / "starts").rglob("adapter_model.safetensors")))
    cut(output / "run.json")
    for name in ("results.jsonl", *TABLES):
        os.truncate(output / name, 0)

    class Killed(BaseException):
        pass

    def killed(*arguments, **more):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_adapter", killed)
        with pytest.raises(Killed):
            execute(recipe, output)
    assert untimed(execute(recipe, output)) == untimed(rows)
    assert adapter.exists()
    for name in TABLES:
        assert (output / name).read_bytes() == (whole / name).read_bytes()
