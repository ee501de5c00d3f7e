"""The whole path on a tiny model: what is made, what is made again, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_task
from filelock import FileLock

from orthomerge.adapters import read_adapter, read_excluded, verify
from orthomerge.errors import OrthomergeError, SubspaceError, TaskError, UnknownNameError
from orthomerge.experiment import Run, parse_recipe
from orthomerge.experiment.progress import Reporter
from orthomerge.experiment.steps import StartStep, StatisticsStep, TrainStep
from orthomerge.io.rows import SINGLE, read_rows


class Counting(Reporter):
    def __init__(self):
        self.trained, self.rows, self.units, self.size = [], [], 0, 0

    def total(self, units):
        self.size = units

    def advance(self, units):
        self.units += units

    def stage(self, description, worker=0):
        if description.startswith("train"):
            self.trained.append(description)

    def row(self, row):
        self.rows.append(row)


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks = [
        str(write_task(folder / "one.jsonl", seed=1)),
        str(write_task(folder / "two.jsonl", seed=2)),
        str(write_task(folder / "length.jsonl", seed=3, regression=True)),
    ]
    return {
        "name": "tiny",
        "base": str(tiny_base),
        "tasks": tasks,
        "seeds": [0, 1],
        "data": {"train": 24, "selection": 12, "test": 16, "max_length": 16},
        "adapter": {"rank": 4, "alpha": 8},
        "statistics": {"samples": 6},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": [1e-3, 5e-3]},
        "arms": {
            "default": {"start": "default", "seeds": [0]},
            "osrm-frozen": {"start": "min_eigen", "constraint": "freeze"},
        },
        "merges": [
            {"method": "task_arithmetic", "weights": [0.5, 1.0]},
            {"method": "ties", "options": {"density": 0.5}},
            {"method": "svd", "options": {"rank": 3}},
        ],
        "save_merged": True,
    }


def execute(values, output):
    reporter = Counting()
    run = Run(parse_recipe(values), output, reporter=reporter)
    return run.execute(), reporter


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "tiny"
    rows, reporter = execute(recipe, output)
    return output, rows, reporter


def test_starts_say_what_they_were_made_from_wherever_the_run_lies(finished, tmp_path):
    output, _, _ = finished
    starts = sorted(p.parent for p in output.glob("starts/**/start.json"))
    assert len(starts) == len(list(output.glob("starts/**/adapter_config.json"))) > 6
    moved = Path(shutil.copytree(output, tmp_path / "moved"))
    for start in [*starts, *(moved / s.relative_to(output) for s in starts)]:
        assert {c.state for c in verify(start)} == {"same"}
        record = json.loads((start / "start.json").read_text())
        inputs = [c.name for c in verify(start) if c.what == "input"]
        assert len(inputs) == (1 if record["config"] is None else 4)  # the base, three statistics
    solved = next(s for s in starts if json.loads((s / "start.json").read_text())["config"])
    (other,) = [p for p in (moved / "stats").iterdir() if "two" in p.name]
    other.write_bytes(other.read_bytes() + b" ")
    found = verify(moved / solved.relative_to(output))
    assert [c.state for c in found if not c.good] == ["altered"]


def test_every_row_is_there_with_what_it_depends_on(recipe, finished):
    output, rows, reporter = finished
    # (2 rates on the selection split + singles and 4 merges a seed) x 3 tasks x seeds
    assert len(rows) == 3 * (2 + 5) + 3 * (2 + 5 * 2)
    assert reporter.units == reporter.size
    assert len(reporter.trained) == 3 * 2 + 3 * (2 + 1)
    assert rows == read_rows(output / "results.jsonl")
    assert len({r.key for r in rows}) == len(rows)
    for row in rows:
        assert row.n == (12 if row.split == "selection" else 16)
        assert row.metrics[row.metric] == row.value
        assert (row.weight is None) == (row.method == SINGLE)
        assert row.majority is not None
    for arm in ("default", "osrm-frozen"):
        scores = {}
        for row in rows:
            if row.arm == arm and row.split == "selection":
                scores.setdefault(row.learning_rate, []).append(row.value)
        best = max(scores, key=lambda rate: sum(scores[rate]))
        used = {r.learning_rate for r in rows if r.arm == arm and r.split == "test"}
        assert used == {best}


def test_a_frozen_A_is_the_start_and_a_trained_one_is_not(finished):
    output, _rows, _ = finished
    for adapter in sorted((output / "adapters" / "osrm-frozen" / "seed0").iterdir()):
        task = adapter.name.rsplit("-", 1)[0]
        starts = (output / "starts" / "min_eigen" / "seed0").iterdir()
        start = next(s for s in starts if s.name.startswith(task))
        for name, trained in read_adapter(adapter).layers.items():
            begun = read_adapter(start).layers[name]
            assert trained.A.equal(begun.A)
            assert trained.B.any()
            assert not begun.B.any()


def test_a_finished_run_does_nothing_again(recipe, finished):
    output, rows, _ = finished
    again, reporter = execute(recipe, output)
    assert again == rows
    assert reporter.units == reporter.size
    assert reporter.trained == []
    assert reporter.rows == []


def test_rows_alone_are_enough_to_go_on(recipe, finished, tmp_path):
    output, rows, _ = finished
    kept = {**recipe, "save_merged": False}
    (tmp_path / "r").mkdir()
    lines = (output / "results.jsonl").read_text().splitlines(keepends=True)
    lost = next(i for i, r in enumerate(rows) if r.method == "ties" and r.arm == "default")
    (tmp_path / "r" / "results.jsonl").write_text("".join(lines[:lost] + lines[lost + 1 :]))
    again, reporter = execute(kept, tmp_path / "r")
    assert [r.key for r in reporter.rows] == [rows[lost].key]
    assert reporter.rows[0].value == rows[lost].value
    assert len(reporter.trained) == 3
    assert {r.key for r in again} == {r.key for r in rows}


def test_changed_data_is_noticed_whatever_the_name(recipe, finished, tmp_path):
    output, rows, _ = finished
    shutil.copytree(output, tmp_path / "r")
    changed = {**recipe, "data": {**recipe["data"], "seed": 7}}
    again, reporter = execute(changed, tmp_path / "r")
    assert len(reporter.rows) == len(rows)
    assert {r.key for r in again}.isdisjoint(r.key for r in rows)
    assert read_rows(tmp_path / "r" / "results.jsonl") == again
    back, reporter = execute(recipe, tmp_path / "r")
    assert {r.key for r in back} == {r.key for r in rows}
    assert reporter.trained == reporter.rows == []


def test_merged_folders_and_the_record_are_kept(finished):
    output, rows, _ = finished
    merged = sorted((output / "merged" / "osrm-frozen" / "seed1").iterdir())
    assert len(merged) == 4
    record = json.loads((merged[0] / "merge.json").read_text())
    assert len(record["adapters"]) == 3
    assert len(list((merged[0] / "heads").iterdir())) == 3
    # Every card tells its readers what each task scores under it, beside its own adapter.
    weight = record["adapters"][0]["weight"]
    mine = [r for r in rows if (r.arm, r.seed, r.split) == ("osrm-frozen", 1, "test")]
    alone = {r.task: r.value for r in mine if r.method == SINGLE}
    scored = [r for r in mine if r.method == record["method"] and r.weight == weight]
    assert [(f["task"], f["value"], f["alone"], f["n"]) for f in record["figures"]] == [
        (r.task, r.value, alone[r.task], 16) for r in scored
    ]
    for folder in merged:
        assert "the run tiny (arm osrm-frozen, seed 1)" in (folder / "README.md").read_text()
        assert all(check.good for check in verify(folder))
    about = json.loads((output / "run.json").read_text())
    assert about["base"]["source"] == "path"
    stages = {"stats", "init", "train", "merge", "eval", "evidence"}
    assert set(about["seconds"]) == set(about["peak_memory"]) == stages
    assert min(about["peak_memory"].values()) > 50e6  # torch alone takes more


def test_two_runs_in_one_folder_are_told(recipe, tmp_path):
    (tmp_path / "r").mkdir()
    with (
        FileLock(tmp_path / "r" / ".lock"),
        pytest.raises(OrthomergeError, match="another run is at work"),
    ):
        execute(recipe, tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"adapter": {"targets": ["q_proj"]}}, UnknownNameError, r"linear layers are .*query"),
        ({"adapter": {"rank": 64}}, SubspaceError, "rank 64 is larger than layer"),
        ({"data": {"train": 5000}}, TaskError, "train rows"),
        ({"base": "no/such-model"}, OrthomergeError, "no model 'no/such-model'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    recipe, tmp_path, monkeypatch, change, error, word
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=word):
        execute({**recipe, **change}, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_task_with_one_label_is_refused(recipe, tmp_path):
    path = tmp_path / "flat.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"a film {i}", "label": "x"}) for i in range(99)))
    with pytest.raises(TaskError, match="label"):
        execute({**recipe, "tasks": [str(path), recipe["tasks"][0]]}, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_what_an_arm_says_of_its_constraint_reaches_its_start_and_its_training(recipe, tmp_path):
    arms = {
        "share": {"start": "contrastive", "constraint": "project", "energy_fraction": 0.7},
        "room": {"start": "contrastive", "constraint": "project", "subspace_dim": 6},
        "quiet": {"start": "min_eigen", "low_energy": 0.01, "samples": 24},
        "few": {"start": "min_eigen", "samples": 2},
    }
    training = {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3}
    values = {**recipe, "arms": arms, "training": training, "seeds": [0], "save_merged": False}
    execute(values, tmp_path / "arms")
    run = Run(parse_recipe(values), tmp_path / "arms")
    for name, dims in (("share", None), ("room", 6)):
        directions = read_excluded(run.space.get(StartStep(name, "one", 0)))
        assert directions.within == (dims is not None)
        assert all(rows.shape[0] == (dims or rows.shape[0]) for rows in directions.rows.values())
        trained = read_adapter(run.space.get(TrainStep(name, "one", 0, 5e-3)))
        for layer, factors in trained.layers.items():
            rows = next(r for n, r in directions.rows.items() if layer.endswith(n))
            inside = factors.A.double() @ rows.T @ rows
            wrong = factors.A - inside if directions.within else inside
            assert float(wrong.norm()) <= 1e-6
    start = json.loads(
        (run.space.get(StartStep("quiet", "one", 0)) / "adapter_config.json").read_text()
    )
    assert start["rank_pattern"]
    steps = [StatisticsStep.for_arm(run.exp, arm)["one"] for arm in ("few", "share")]
    assert [run.space.get(step).meta.samples for step in steps] == [2, 6]


def test_the_lowest_rate_within_the_tolerance_is_taken(recipe, tmp_path):
    arms = {"default": {"start": "default", "seeds": [0]}}
    rates = [5e-3, 1e-3]
    for tolerance, chosen in ((2.0, {1e-3}), (0.0, {1e-3, 5e-3})):
        training = {**recipe["training"], "learning_rate": rates, "rate_tolerance": tolerance}
        rows, _ = execute({**recipe, "arms": arms, "training": training}, tmp_path / "rates")
        assert {r.learning_rate for r in rows if r.split == "test"} <= chosen


def test_a_weight_is_chosen_on_selection_rows_and_tested_once(recipe, finished, tmp_path):
    """Of 1 and the candidates the best by selection rows is tested; the run then asks for nothing.

    The adapters are those of the finished run: only merges are made.
    """
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    candidates = [0.3, 2.0]
    values = {
        **recipe,
        "arms": {"osrm-frozen": recipe["arms"]["osrm-frozen"]},
        "merges": [{"method": m, "choose_from": candidates} for m in ("ties", "emr")],
    }
    rows, reporter = execute(values, output)
    assert not reporter.trained and reporter.units == reporter.size
    for method in ("ties", "emr"):
        for seed in (0, 1):
            mine = [r for r in rows if r.method == method and r.seed == seed]
            scores = {}
            for row in mine:
                if row.split == "selection":
                    scores.setdefault(row.weight, []).append(row.value)
            assert set(scores) == {1.0, *candidates}
            best = max(scores, key=lambda w: (sum(scores[w]), -abs(w - 1)))
            assert {r.weight for r in mine if r.split == "test"} == {1.0, best}
    about = json.loads((output / "run.json").read_text())
    assert about["expected_rows"] == len(rows)
    again, reporter = execute(values, output)
    assert not reporter.rows and {r.key for r in again} == {r.key for r in rows}


def test_methods_get_the_statistics_and_fisher_information_they_need(recipe, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    values = {
        **recipe,
        "arms": {"osrm-frozen": {**recipe["arms"]["osrm-frozen"], "seeds": [0]}},
        "merges": [{"method": m} for m in ("regmean", "osrm_aware", "fisher", "emr")],
    }
    rows, reporter = execute(values, output)
    assert not reporter.trained
    assert {r.method for r in rows if r.split == "test"} >= {"regmean", "osrm_aware", "fisher"}
    assert len(list((output / "fisher" / "osrm-frozen" / "seed0").iterdir())) == 3
    assert len(list((output / "merged" / "osrm-frozen" / "seed0").glob("emr*"))) == 1
