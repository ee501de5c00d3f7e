"""The plan of a recipe: its counts, its arithmetic, and the page that quotes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import call
from safetensors.torch import load_file
from tiny_recipe import execute, make_recipe
from transformers import AutoModel

from orthomerge.errors import OrthomergeError
from orthomerge.experiment import dry_run, load_recipe, parse_recipe
from orthomerge.experiment.estimate import estimated, measured, read_rates, wall_seconds
from orthomerge.experiment.preview import Preview, speed_of, throughput_of_run, work_by_stage
from orthomerge.experiment.sizes import base_size, shapes_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("plan-8b.yaml")[0]


def test_the_page_says_what_the_command_prints(monkeypatch):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- dry run -->\n```text\n(.*?)```", page, re.DOTALL)
    assert block is not None
    monkeypatch.setenv("COLUMNS", "100")
    said = call("run", "plan-8b.yaml", "--dry-run", "--speed", "h100", "--jobs", 8)
    assert block[1].split() == said[said.index("to do") :].split()


def test_steps_are_counted_as_the_recipe_asks(recipe, tmp_path):
    found = dry_run(recipe, tmp_path, speed=estimated("h100"))
    # 8 tasks, 3 arms, 3 seeds; a second rate at the first seed; 5 candidates, then 1 and the best.
    assert found.jobs == {
        "stats": 8, "start": 72, "train": 96, "eval": 48 + 72, "merge": 9 * (5 + 2 + 1),
    }  # fmt: skip
    assert found.rows == 48 + 72 + 9 * 8 * 8


def test_a_model_of_known_dimensions_has_its_published_size():
    # As published: 8.03 billion with the output layer, which a backbone has not.
    meta_model, source = shapes_of("meta-llama/Llama-3.1-8B", None)
    assert sum(p.numel() for p in meta_model.parameters()) + 128256 * 4096 == 8_030_261_248
    assert source == "published dimensions"
    size = base_size(meta_model, ["q_proj"])
    assert size.parameters - size.multiplied == 128256 * 4096  # the embedding is looked up
    roberta, _ = shapes_of("FacebookAI/roberta-large", None)
    assert sum(p.numel() for p in roberta.parameters()) == pytest.approx(355e6, rel=0.01)


def test_a_base_on_disk_is_counted_to_the_parameter(tiny_base):
    meta_model, source = shapes_of(str(tiny_base), None)
    real = AutoModel.from_pretrained(tiny_base)
    assert [p.shape for p in meta_model.parameters()] == [p.shape for p in real.parameters()]
    assert all(p.device.type == "meta" for p in meta_model.parameters())
    assert source == "its config"


def test_a_base_that_nobody_knows_is_asked_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OrthomergeError, match=r"config.json.*llama-3.1-8b"):
        shapes_of("no/such-model", None)


def test_a_run_planned_at_its_own_speed_takes_the_time_it_took():
    record = json.loads((ROOT / "results" / "limits-samples" / "run.json").read_text())
    exp = Preview(parse_recipe(yaml.safe_load(record["recipe"])), "")
    work, speed = work_by_stage(exp, exp.whole()), throughput_of_run(record, "run.json")
    stages = {stage: speed.seconds({stage: n}) for stage, n in work.items() if n}
    for stage, seconds in stages.items():
        if stage in record["seconds"]:
            assert seconds == pytest.approx(record["seconds"][stage])


def test_workers_share_the_time_and_no_more(recipe, tmp_path):
    speed, exp = estimated("a100"), Preview(recipe, tmp_path)
    steps = exp.whole()
    one, eight, many = (wall_seconds(exp, steps, speed, n) for n in (1, 8, 10**6))
    assert one == pytest.approx(dry_run(recipe, tmp_path, speed=speed).total.seconds)
    assert one / 8 <= eight <= one / 4
    longest = max(speed.seconds(step.cost(exp).work) for step in steps.values())
    assert longest <= many < eight


def test_what_is_there_is_not_left_to_do_and_nothing_is_written(tiny_base, tmp_path):
    values = make_recipe(tmp_path / "tasks", tiny_base)
    recipe, output = parse_recipe(values), tmp_path / "run"
    fresh = dry_run(recipe, output, speed=estimated("h100"))
    assert fresh.there == 0 and not output.exists()
    rows = execute(values, output, text=yaml.safe_dump(values))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done = dry_run(recipe, output)
    assert (done.there, done.rows, done.jobs) == (len(rows), len(rows), {})
    more = dry_run(parse_recipe(values | {"seeds": [0, 1]}), output)
    assert more.jobs["train"] == 4 and more.rows > more.there == len(rows)
    assert more.speed.source.startswith("measured by the run of")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_the_disk_of_merges_is_what_they_take(tiny_base, tmp_path):
    """Full-rank merges are written at full rank, an update per task for each of them."""
    values = make_recipe(tmp_path / "tasks", tiny_base) | {
        "arms": {"default": {"start": "default"}},
        "save_merged": True,
    }
    for method, more in (
        ("ties", {}), ("linear", {}), ("emr", {}), ("ties", {"rank": 2}),
        ("svd", {"options": {"rank": 3}}),
    ):  # fmt: skip
        values["merges"] = [{"method": method, **more}]
        output = tmp_path / f"{method}{len(more)}"
        told = dry_run(parse_recipe(values), output, speed=estimated("h100")).kinds["merge"].disk
        execute(values, output)
        files = (output / "merged").rglob("adapter_model.safetensors")
        tensors = sum(v.nbytes for p in files for k, v in load_file(p).items() if "lora_" in k)
        assert told == tensors, method


def test_speed_can_be_given_or_measured(tmp_path):
    dry = ("run", "plan-8b.yaml", "--dry-run", "--json", "--speed")
    out = json.loads(call(*dry, "a100"))
    (tmp_path / "rates.json").write_text(json.dumps(out["throughput"]))
    again = json.loads(call(*dry, tmp_path / "rates.json"))
    assert again["kinds"] == out["kinds"]
    assert all(rate > 0 for rate in measured(size=128, seconds=0.01).rates.values())
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OrthomergeError, match="holds no throughput"):
        read_rates(tmp_path / "other.json")
    with pytest.raises(OrthomergeError, match="h100, a100"):
        speed_of("v100")
    with pytest.raises(OrthomergeError, match="--speed is for --dry-run"):
        call("run", "demo", "--speed", "h100", "--output", tmp_path / "run")


def test_the_old_name_says_the_same_and_the_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    said = call("plan", "plan-8b.yaml", "--gpus", 8)
    new = call("run", "plan-8b.yaml", "--dry-run", "--speed", "h100", "--jobs", 8)
    assert new in said
    assert "'orthomerge plan' is now 'orthomerge run RECIPE --dry-run'" in said


@pytest.mark.parametrize(
    "merge", [{"method": "ties"}, {"method": "ties", "rank": 4}, {"method": "emr"}]
)
def test_the_disk_of_a_merge_that_is_kept_is_what_it_takes(tmp_path, tiny_base, merge):
    values = make_recipe(tmp_path / "data", tiny_base) | {
        "arms": {"default": {"start": "default"}}, "save_merged": True,
        "merges": [{**merge, "weights": [1.0]}],
    }  # fmt: skip
    planned = dry_run(parse_recipe(values), tmp_path / "out", speed=estimated("h100"))
    execute(values, tmp_path / "out")
    for kind, place in (("merge", "merged"), ("train", "adapters")):
        files = (tmp_path / "out" / place).rglob("adapter_model.safetensors")
        taken = sum(file.stat().st_size for file in files)
        # Beside the factors there are names and heads, which count on models as small as this one.
        assert 0 <= taken - planned.kinds[kind].disk < 11_000, kind
