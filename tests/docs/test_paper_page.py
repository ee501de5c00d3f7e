"""The page on the paper's claims is made from rows: verdicts follow from them, whatever the run."""

from __future__ import annotations

import pytest
from blocks import ROOT

from orthomerge.io.rows import ResultRow, append_rows

RECIPE = """
name: made-up
base: mpnet-base
tasks: [glue/sst2, glue/rte]
arms:
  default: {start: default}
  osrm: {start: min_eigen}
  penalty: {start: default, constraint: penalty}
  isotropic: {start: default, constraint: penalty, penalty_moment: isotropic}
  osrm-rank32: {start: min_eigen, rank: 32}
  default-rank32: {start: default, rank: 32}
merges:
  - {method: task_arithmetic, weights: [0.2, 0.6, 1.0]}
  - {method: ties, choose_from: [2.0]}
"""
SEEDS = (0, 1, 2)


def rows_of(arm, method, scores, weight=None, split="test"):
    return [
        ResultRow(
            task=task, arm=arm, start="", solver=None, granularity=None, constraint="init",
            learning_rate=1e-3, method=method, weight=weight, metric="accuracy", value=score,
            seed=seed, n=10, split=split, key=f"{arm} {method} {weight} {split} {task} {seed}",
        )
        for seed, score in zip(SEEDS, scores, strict=False)
        for task in ("glue/sst2", "glue/rte")
    ]  # fmt: skip


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import paper

    return paper


@pytest.fixture
def found(tmp_path, paper):
    """`osrm` is 10 points better in every sum, worse by TIES, and as good alone."""
    folder = tmp_path / "made-up"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    rows = []
    for arm, gain in (("default", 0.0), ("osrm", 0.1), ("penalty", 0.1), ("isotropic", 0.3)):
        rows += rows_of(arm, "single", (0.8, 0.81, 0.79))
        for weight in (0.2, 0.6, 1.0):
            sums = (0.6 + gain, 0.62 + gain, 0.58 + gain)
            rows += rows_of(arm, "task_arithmetic", sums, weight)
        rows += rows_of(arm, "ties", (0.7 - gain, 0.7 - gain, 0.7 - gain), 1.0)
        # At 2.0, which selection rows choose, TIES gains.
        rows += rows_of(arm, "ties", (0.5 + gain,) * 3, 2.0)
        rows += rows_of(arm, "ties", (0.1,) * 3, 1.0, "selection")
        rows += rows_of(arm, "ties", (0.2,) * 3, 2.0, "selection")
    for arm, score in (("default-rank32", 0.6), ("osrm-rank32", 0.5)):
        rows += rows_of(arm, "single", (0.8,)) + rows_of(arm, "task_arithmetic", (score,), 1.0)
    append_rows(folder / "results.jsonl", rows)
    return {claim.title.split(",")[0]: claim for claim in paper.claims(paper.studies(tmp_path))}


def test_verdicts_follow_from_rows(found):
    every = found["Merged better"]
    of = {(c[1], c[4]): (c[5:], verdict) for c, _, verdict in every.lines}
    cells, verdict = of["`osrm`", "as published"]  # the sum gains, TIES loses
    assert cells == ["2", "0.0", "1 / 0 / 1", "3"] and verdict == "not seen"
    cells, verdict = of["`osrm`", "chosen"]
    assert cells == ["1", "+10.0", "1 / 0 / 0", "3"] and verdict == "confirmed"
    assert "`isotropic`" not in {arm for arm, _ in of}  # a control
    single = found["A single adapter loses nothing"]
    assert single.verdict("the paper's start") == "mpnet-base, GLUE: confirmed 2"
    robust = found["Robust to the merge weight"]
    assert next(c[4:] for c, _, _ in robust.lines) == [
        "0.2 to 1", "60.0 ± 2.0", "70.0 ± 2.0", "+10.0 ± 0.0", "3",
    ]  # fmt: skip
    rank = found["The gain is there at every rank"]
    assert [(c[4], c[7], verdict) for c, _, verdict in rank.lines] == [
        ("8", "+10.0 ± 0.0", "confirmed"), ("32", "-10.0", "reversed"),
    ]  # fmt: skip
    assert found["From 1 to 300 samples per task"].verdict("the paper's start") == "not measured"


def test_the_page_is_what_the_kept_rows_say(paper):
    assert paper.PAGE.read_text(encoding="utf-8") == paper.page(), "run: python -m benchmarks.paper"
