"""The plan of a recipe: its counts, its arithmetic, and the page that quotes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import printed
from transformers import AutoModel

from orthomerge.errors import OrthomergeError
from orthomerge.experiment import load_recipe, parse_recipe
from orthomerge.experiment.plan import Plan, throughput_of_run
from orthomerge.experiment.sizes import base_size
from orthomerge.experiment.skeletons import find_skeleton
from orthomerge.experiment.throughput import estimated, measured, read_rates

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plan():
    return Plan(load_recipe("plan-8b.yaml")[0])


def test_the_page_says_what_the_command_prints():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- plan -->\n```text\n(.*?)```", page, re.DOTALL)
    assert block is not None
    assert block[1] == printed("plan", "plan-8b.yaml", "--gpus", 8)


def test_jobs_are_counted_as_the_recipe_asks(plan):
    kinds = plan.estimate(estimated("h100"), 1)["kinds"]
    counts = {kind: entry["jobs"] for kind, entry in kinds.items()}
    # 8 tasks, 3 arms, 3 seeds; a second rate at the first seed; 5 candidates, then 1 and the best.
    assert counts == {
        "stats": 8, "start": 72, "train": 96, "eval": 48 + 72, "merge": 9 * (5 + 2 + 1),
    }  # fmt: skip
    assert plan.rows == 48 + 72 + 9 * 8 * 8


def test_a_model_of_known_dimensions_has_its_published_size():
    # As published: 8.03 billion with the output layer, which a trunk has not.
    skeleton, source = find_skeleton("meta-llama/Llama-3.1-8B")
    assert sum(p.numel() for p in skeleton.parameters()) + 128256 * 4096 == 8_030_261_248
    assert source == "published dimensions"
    size = base_size(skeleton, ["q_proj"])
    assert size.parameters - size.multiplied == 128256 * 4096  # the embedding is looked up
    roberta, _ = find_skeleton("FacebookAI/roberta-large")
    assert sum(p.numel() for p in roberta.parameters()) == pytest.approx(355e6, rel=0.01)


def test_a_base_on_disk_is_counted_to_the_parameter(tiny_base):
    skeleton, source = find_skeleton(str(tiny_base))
    real = AutoModel.from_pretrained(tiny_base)
    assert [p.shape for p in skeleton.parameters()] == [p.shape for p in real.parameters()]
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    assert source == "its config"


def test_a_base_that_nobody_knows_is_asked_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OrthomergeError, match=r"config.json.*llama-3.1-8b"):
        find_skeleton("no/such-model")


def test_a_run_planned_at_its_own_speed_takes_the_time_it_took():
    record = json.loads((ROOT / "results" / "limits-samples" / "run.json").read_text())
    recipe = parse_recipe(yaml.safe_load(record["recipe"]))
    plan, speed = Plan(recipe), throughput_of_run(record, "run.json")
    stages = {stage: speed.seconds({stage: n}) for stage, n in plan.by_stage().items() if n}
    for stage, seconds in stages.items():
        if stage in record["seconds"]:
            assert seconds == pytest.approx(record["seconds"][stage])


def test_workers_share_the_hours_and_no_more(plan):
    speed = estimated("a100")
    one, eight, many = (plan.estimate(speed, n) for n in (1, 8, 10**6))
    assert one["wall_hours"] == pytest.approx(one["hours"])
    assert one["hours"] / 8 <= eight["wall_hours"] <= one["hours"] / 4
    longest = max(speed.seconds(plan.work(job)) for job in plan.jobs) / 3600
    assert longest <= many["wall_hours"] < eight["wall_hours"]


def test_speed_can_be_given_or_measured(plan, tmp_path):
    out = json.loads(printed("plan", "plan-8b.yaml", "--card", "a100", "--json"))
    (tmp_path / "rates.json").write_text(json.dumps(out["throughput"]))
    again = json.loads(
        printed("plan", "plan-8b.yaml", "--throughput", tmp_path / "rates.json", "--json")
    )
    assert again["kinds"] == out["kinds"]
    assert all(rate > 0 for rate in measured(size=128, seconds=0.01).rates.values())
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OrthomergeError, match="holds no throughput"):
        read_rates(tmp_path / "other.json")
    with pytest.raises(OrthomergeError, match="h100, a100"):
        estimated("v100")
