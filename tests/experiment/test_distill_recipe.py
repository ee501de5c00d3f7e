"""Distilled merges in a recipe: planned, made once, gone on with, and scored like other merges."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import call
from peft import PeftModel
from safetensors.torch import load_file
from test_text_recipe import KINDS, make
from tiny_recipe import check_journal, execute, make_recipe, untimed
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from orthomerge import distill_adapters, verify
from orthomerge.adapters import read_adapter
from orthomerge.errors import OrthomergeError
from orthomerge.experiment import dry_run, parse_recipe
from orthomerge.experiment.executors import ProcessExecutor
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.progress import Reporter
from orthomerge.experiment.steps import DistilledStep, DistillStep
from orthomerge.io.analyses import read_analyses
from orthomerge.training import DistillSettings

DISTILL = {"method": "distill", "from": {"weight": 0.5}, "rank": 4, "steps": [4, 6], "samples": 20}
FAST = {"learning_rate": 1e-2, "evaluate_every": 2}


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory):
    values = make_recipe(tmp_path_factory.mktemp("tasks"), tiny_base)
    del values["arms"]["osrm"]
    more = {**DISTILL, **FAST, "from": {"method": "fisher"}, "steps": 2, "texts": "others"}
    layers = {**DISTILL, "from": {"method": "regmean", "layer_wise": True}, "steps": 0}
    return {**values, "merges": [values["merges"][0], {**DISTILL, **FAST}, more, layers]}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return output, execute(recipe, output)


def folders(output):
    found = {}
    for folder in output.glob("distilled/default/seed0/distill-*"):
        said = json.loads((folder / "merge.json").read_text())["distilled"]
        found[said["settings"]["steps"]] = folder
    return found


def test_a_list_is_a_merge_for_each_and_every_row_says_which(recipe, finished):
    output, rows = finished
    mine = [r for r in rows if r.method == "distill"]
    assert [(r.weight, r.options["from"], r.options["steps"]) for r in mine[::2]] == [
        (0.5, "linear", 4), (0.5, "linear", 6), (None, "fisher", 2),
        (None, "regmean (layer_wise)", 0),
    ]  # fmt: skip
    assert {r.options["rank"] for r in mine} == {4} and mine[-3].options["texts"] == "others"
    assert sorted(folders(output)) == [0, 2, 4, 6]
    assert all(check.good for folder in folders(output).values() for check in verify(folder))
    assert not list(output.rglob("*.work"))


def test_a_row_is_what_peft_itself_scores_with_the_tasks_own_head(recipe, finished, tmp_path):
    output, rows = finished
    folder = folders(output)[6]
    (row,) = [r for r in rows if r.options.get("steps") == 6 and r.task == "one"]
    model = AutoModelForSequenceClassification.from_pretrained(recipe["base"], num_labels=2)
    model.load_state_dict(load_file(folder / "heads" / "one.safetensors"), strict=False)
    model = PeftModel.from_pretrained(model, folder).eval()
    test = Experiment(parse_recipe(recipe), tmp_path).data["one"].test
    batch = AutoTokenizer.from_pretrained(recipe["base"])(
        [r.text for r in test], padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1).tolist()
    assert row.value == sum(a == r.label for a, r in zip(said, test, strict=True)) / len(test)


def test_it_is_the_librarys_distillation_of_these_adapters_on_the_training_texts(
    recipe, finished, tmp_path
):
    output, _ = finished
    exp = Experiment(parse_recipe(recipe), output)
    step = DistillStep("default", 0, 5e-3, 1, 0.5)
    assert step.path(exp) == folders(output)[4]
    parts = [made.path(exp) for made in step.adapters(exp).values()]
    texts = [[r.text for r in exp.data[task].train] for task in exp.tasks]
    settings = DistillSettings(steps=4, max_length=16, **FAST)
    own = distill_adapters(parts, texts, weights=0.5, rank=4, samples=20, settings=settings)
    for name, factors in read_adapter(step.path(exp)).layers.items():
        torch.testing.assert_close(factors.delta(), own.factors[name].delta())


def test_the_page_has_its_agreement_and_its_cost(finished):
    output, _ = finished
    found = read_analyses(output).distillations
    assert [(d.steps, d.texts) for d in found] == [(4, 40), (6, 40), (2, 40), (0, 40)]
    record = json.loads((folders(output)[6] / "merge.json").read_text())["distilled"]
    assert found[1].seconds == pytest.approx(sum(record["seconds"].values()), rel=1e-3)
    best = next(m for m in record["measured"] if m["step"] == record["best"])
    assert found[1].after == pytest.approx(best["agreement"], rel=1e-3)
    assert found[1].best == record["best"]
    call("report", output)
    page = (output / "report.html").read_text(encoding="utf-8")
    table = page[page.index('id="distillation"') :]
    table = table[: table.index("</table>")]
    assert table.count('<th scope="row"') == 4
    assert f"{sum(found[1].after.values()) / 2:.3f}" in table and ">40<" in table


def test_a_finished_run_does_nothing_again_and_rows_alone_are_enough(recipe, finished, tmp_path):
    output, rows = finished
    assert execute(recipe, output) == rows
    check_journal(output)
    (tmp_path / "bare").mkdir()
    shutil.copy(output / "results.jsonl", tmp_path / "bare")
    shutil.copy(output / "run.json", tmp_path / "bare")
    assert execute(recipe, tmp_path / "bare") == rows
    assert not (tmp_path / "bare" / "distilled").exists()


def test_several_processes_give_the_same_rows(recipe, finished, tmp_path):
    output, rows = finished
    shutil.copytree(output / "adapters", tmp_path / "out" / "adapters")
    shutil.copy(output / "run.json", tmp_path / "out")
    there = execute(recipe, tmp_path / "out", executor=ProcessExecutor(2))
    assert untimed(there) == untimed(rows)


class Stopped(Reporter):
    """Stops the third distillation's training, or none."""

    def __init__(self, at=None):
        self.at, self.seen, self.stage_ = at, [], ""

    def stage(self, description, worker=0):
        self.stage_ = description

    def step(self, done, of, worker=0):
        if self.stage_.startswith("distill") and of == 6:
            self.seen.append(done)
            if done == self.at:
                raise KeyboardInterrupt


def test_a_distillation_that_was_stopped_goes_on_where_it_was(recipe, finished, tmp_path):
    output, rows = finished
    recipe = {**recipe, "merges": [recipe["merges"][1]]}
    mine = tmp_path / "out"
    for part in ("adapters", "teachers"):
        shutil.copytree(output / part, mine / part)
    shutil.copy(output / "run.json", mine)
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, mine, reporter=Stopped(5))
    again = Stopped()
    found = execute(recipe, mine, reporter=again)
    assert again.seen == [5, 6]  # the checkpoint is of step 4
    wanted = [r for r in rows if r.method == "single" or r.options.get("from") == "linear"]
    assert untimed(found) == untimed(wanted)
    assert not list(mine.rglob("*.work"))


def test_a_key_depends_on_all_that_changes_the_result(recipe, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a film"}\n{"text": "a plot"}\n')

    def key(**changes):
        entry = {**DISTILL, **FAST, "steps": 4, **changes}
        weights = entry["from"].get("weight")
        exp = Experiment(parse_recipe({**recipe, "merges": [entry]}), tmp_path)
        return exp.key(DistillStep("default", 0, 5e-3, 0, weights))

    changes = [
        {"rank": 8}, {"rank": None}, {"steps": 5}, {"samples": 10}, {"texts": "others"},
        {"texts": str(texts)}, {"learning_rate": 3e-3}, {"batch_size": 5}, {"hidden": 0.5},
        {"warmup": 0}, {"held_out": 0.2}, {"evaluate_every": 1}, {"patience": 1}, {"seed": 1},
        {"max_length": 8}, {"from": {}}, {"from": {"weight": 0.4}},
        {"from": {"weight": 0.5, "method": "ties", "options": {"density": 0.3}}},
        {"from": {"weight": 0.5, "method": "ties", "options": {"density": 0.2}}},
        {"from": {"weight": 0.5, "method": "regmean"}}, {"steps": 0},
        {"from": {"weight": 0.5, "method": "regmean", "layer_wise": True}},
    ]  # fmt: skip
    keys = [key(), *(key(**change) for change in changes)]
    assert len(set(keys)) == len(keys)
    texts.write_text('{"text": "a film"}\n{"text": "a war"}\n')
    assert key(texts=str(texts)) not in keys
    assert key(seed=0) == key()  # the run's own


def test_a_dry_run_counts_it_and_reads_no_label(recipe, tmp_path):
    found = dry_run(parse_recipe(recipe), tmp_path / "none")
    assert found.jobs["distill"] == 4 and found.jobs["merge"] == 6
    assert found.kinds["distill"].disk > 0 and found.kinds["distill"].seconds > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stps": 3}, "did you mean 'steps'"),
        ({"from": {"weights": 1}}, "did you mean 'weight'"),
        ({"steps": -1}, r"'merges.0.steps.0' is -1"),
        ({"rank": "small"}, "rank 'small'"),
        ({"texts": "nowhere.jsonl"}, "no texts 'nowhere.jsonl'"),
        ({"from": {"method": "emr"}}, "an update per task"),
        ({"from": {"method": "ties", "layer_wise": True}}, "not merged layer by layer"),
        ({"learning_rate": -1}, "learning rate -1"),
    ],
)
def test_a_mistake_is_one_sentence(recipe, tmp_path, change, words):
    with pytest.raises(OrthomergeError, match=words):
        dry_run(
            parse_recipe({**recipe, "merges": [{"method": "distill", **change}]}), tmp_path / "none"
        )


@pytest.mark.parametrize("kind", list(KINDS))
def test_tasks_in_words_are_distilled_too(kind, tmp_path):
    values = make(tmp_path, kind)
    arms = {"default": {"start": "default", "tasks": 2}}
    entry = {"method": "distill", "steps": 2, "samples": 8, "learning_rate": 1e-2}
    rows = execute({**values, "arms": arms, "merges": [entry]}, tmp_path / "out")
    mine = [r for r in rows if r.method == "distill"]
    assert {r.task for r in mine} == {"a", "b"} and {r.form for r in mine} == {"text"}
    exp = Experiment(parse_recipe({**values, "arms": arms, "merges": [entry]}), tmp_path / "out")
    step = DistilledStep("default", 0, 1e-2, "test", 0, None)
    record = json.loads((step.folder(exp) / "merge.json").read_text())
    assert record["distilled"]["form"] == "text"
