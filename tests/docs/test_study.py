"""The study under examples/, as a researcher would call it."""

from __future__ import annotations

import json
import runpy

import pandas as pd
import pytest
from blocks import ROOT
from conftest import write_task

from orthomerge.adapters import read_adapter
from orthomerge.evaluation import Evaluator
from orthomerge.models import load_tokenizer
from orthomerge.tasks import get_task

SCRIPT = str(ROOT / "examples" / "study.py")


def test_the_study_trains_merges_and_scores_two_tasks(tiny_base, tmp_path, monkeypatch, capsys):
    tasks = [
        str(write_task(tmp_path / "one.jsonl", seed=1)),
        str(write_task(tmp_path / "length.jsonl", seed=3, regression=True)),
    ]
    output = tmp_path / "study"
    words = [str(tiny_base), *tasks, "--output", str(output), "--rows", "24", "--test", "12"]
    monkeypatch.setattr("sys.argv", [SCRIPT, *words])
    script = runpy.run_path(SCRIPT, run_name="__main__")

    arms, columns = script["ARMS"], ["single", *script["MERGES"]]
    scores = pd.read_csv(output / "scores.csv")
    assert len(scores) == len(arms) * 2 * len(columns) == len(scores.drop_duplicates(
        ["arm", "seed", "task", "merge"]))  # fmt: skip
    assert scores.score.between(-1, 1).all()
    shown = capsys.readouterr().out
    table = script["table"](scores)
    assert list(table.index) == list(arms) and list(table.columns) == columns
    mean = 100 * scores[(scores.arm == "osrm") & (scores["merge"] == "single")].score.mean()
    assert table.loc["osrm", "single"] == pytest.approx(mean, abs=0.06)
    assert all(arm in shown for arm in arms)

    # The folders are the adapters that were scored, trained under their arm's constraint.
    for arm, config in arms.items():
        folder = output / "seed0" / arm / "one"
        found = json.loads((folder / "training.json").read_text())
        assert found["constraint"] == config.constraint
    adapter, task = read_adapter(output / "seed0" / "penalty" / "one"), get_task(tasks[0])
    judge = Evaluator(str(tiny_base), load_tokenizer(str(tiny_base)), max_length=48)
    again = judge.score(task, task.data(train=24, test=12).test, adapter.layers, adapter.modules)
    (row,) = scores[
        (scores.arm == "penalty") & (scores.task == "one") & (scores["merge"] == "single")
    ].score
    assert again[task.metric] == pytest.approx(row)
