"""lm-evaluation-harness on our rows, against our own likelihoods, row by row."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from conftest import call
from peft import LoraConfig, get_peft_model
from tiny_text import LLAMA_TARGETS, easy_task, regression_task, save_tiny
from torch import nn
from typer.testing import CliRunner

from orthomerge.adapters import read_adapter
from orthomerge.cli import app
from orthomerge.errors import RecipeError, TaskError
from orthomerge.evaluation.harness import export_task, require_harness, run_harness, scores
from orthomerge.evaluation.text import TextEvaluator
from orthomerge.models.loading import load_language_model, load_tokenizer
from orthomerge.tasks import get_task, prompt_of

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the package lm-eval"
)
ROWS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two adapters and what they merge to, and a table of a task."""
    folder = tmp_path_factory.mktemp("harness")
    base = save_tiny(folder / "base")
    for name in "ab":
        model = load_language_model(str(base))
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
        for weight in adapted.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight, std=0.2)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
    call("merge", folder / "a", folder / "b", "--base", base, "--output", folder / "merged")
    easy_task(folder / "rows.jsonl", ("king", "queen"), 200)
    return folder


# The last two are where a tokeniser joins a prompt's end with its answer, or an answer has spaces.
TEMPLATES = {
    "word": "{text}\nAnswer:",
    "space": "{text}\nAnswer: ",
    "line": "{text}\n",
    "text": {"prompt": "Which? {text}", "answers": ["not at all", "it does"]},
}


@needs_harness
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_harness_weighs_every_answer_of_every_row_as_we_do(place, tmp_path, template):
    task = get_task(str(place / "rows.jsonl"))
    prompt = prompt_of(task, TEMPLATES[template])
    file = export_task(task, prompt, tmp_path / "tasks", rows=ROWS, seed=3)
    rows = task.data(test=ROWS, seed=3).test
    model, tokenizer = (f(str(place / "base")) for f in (load_language_model, load_tokenizer))
    update = read_adapter(place / "merged").layers
    result = run_harness(model, tokenizer, [str(tmp_path / "tasks")], update)
    samples = sorted(result["samples"][file.stem], key=lambda s: s["doc_id"])
    judge = TextEvaluator(model, tokenizer)
    ours = judge.likelihoods(rows, prompt, update)
    theirs = np.array([[value for value, _ in s["filtered_resps"]] for s in samples])
    np.testing.assert_allclose(theirs, ours.sums, atol=2e-4, rtol=1e-5)
    assert np.ptp(ours.sums[:, 0] - ours.sums[:, 1]) > 0.1  # rows do differ
    chosen = ours.sums.argmax(axis=1)
    labels = [row.label for row in rows]
    assert [int(s["acc"]) for s in samples] == [
        int(c == x) for c, x in zip(chosen, labels, strict=True)
    ]
    mine = judge.predict(rows, prompt, update).metrics("classification", labels, 2)
    found = scores(result)[file.stem]
    assert found["acc"] == pytest.approx(mine["accuracy"], abs=1e-12)
    assert found["mcc"] == pytest.approx(mine["matthews"], abs=1e-12)
    assert judge.likelihoods(rows, prompt).sums[0] != pytest.approx(ours.sums[0], abs=1e-3)


@needs_harness
def test_a_merged_adapter_is_scored_by_the_harness_from_the_command_line(place, tmp_path):
    """Exported and run as a user does, next to the same rows by our own scoring."""
    data, base = place / "rows.jsonl", place / "base"
    words = ("--template", "{text}\nAnswer:")
    said = call("list", "tasks", "--export-harness", tmp_path / "tasks", "--task", data, *words,
                "--rows", ROWS, "--json")  # fmt: skip
    (exported,) = json.loads(said)
    assert exported["task"] == "orthomerge_rows"
    run = ("eval", place / "merged", "--base", base)
    whole = (*run, "--harness", tmp_path / "tasks", "--output", tmp_path / "r.json", "--json")
    shown = CliRunner().invoke(app, list(map(str, whole)), catch_exceptions=False)
    theirs = json.loads(shown.stdout)["orthomerge_rows"]  # the harness's bars are beside it
    said = call(*run, "--task", data, "--form", "text", *words, "--rows", ROWS, "--json")
    assert theirs["acc"] == json.loads(said)["metrics"]["accuracy"]
    kept = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert kept["results"]["orthomerge_rows"]["acc,none"] == theirs["acc"]
    assert kept["adapter_sha256"] == read_adapter(place / "merged").sha256
    assert kept["n-samples"]["orthomerge_rows"]["effective"] == ROWS
    cut = call(*run, "--harness", exported["path"], "--rows", 5, "--output", tmp_path / "5.json")
    assert "orthomerge_rows" in cut
    kept = json.loads((tmp_path / "5.json").read_text("utf-8"))
    assert kept["n-samples"]["orthomerge_rows"]["effective"] == 5


def test_without_tasks_named_every_offline_classification_is_exported(tmp_path):
    said = call("list", "tasks", "--export-harness", tmp_path, "--rows", 4)
    files = {f.stem for f in tmp_path.glob("*.yaml")}
    assert files == {f"orthomerge_{n}" for n in (
        "acceptability", "excerpt", "role", "sentiment", "subjectivity", "topic")}  # fmt: skip
    assert "lm-eval run --include_path" in said
    lines = (tmp_path / "orthomerge_sentiment.jsonl").read_text("utf-8").splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 4
    assert row["choices"] == ["rotten", "fresh"]
    assert row["query"].startswith("Is this film review")


@needs_harness
@pytest.mark.parametrize(
    "tasks, said",
    [
        pytest.param(  # the harness reads every one of its thousands of files first
            "arc_eazy", r"no task 'arc_eazy': did you mean 'arc_easy'\?", marks=pytest.mark.slow
        ),
        ("nothing.yaml", "no file 'nothing.yaml'"),
        (".", r"no YAML file of a task in '\.'"),
    ],
)
def test_a_task_that_is_not_there_is_one_sentence(place, tmp_path, monkeypatch, tasks, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=said) as problem:
        call("eval", place / "merged", "--base", place / "base", "--harness", tasks)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    "more, said",
    [
        (("--harness", "arc_easy", "--task", "sentiment"), "leave out --task"),
        ((), "name a --task, a --test-file or a --harness"),
        (("--task", "sentiment", "--few-shot", "2"), "go with --harness"),
    ],
)
def test_what_does_not_go_together_is_refused(place, more, said):
    with pytest.raises(RecipeError, match=said):
        call("eval", place / "merged", *more)


def test_a_task_answered_by_numbers_is_refused(tmp_path):
    task = get_task(str(regression_task(tmp_path / "r.jsonl")))
    with pytest.raises(TaskError, match="answered by a number"):
        export_task(task, prompt_of(task), tmp_path / "tasks", rows=5)
    assert not (tmp_path / "tasks").exists()


def test_without_the_package_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("orthomerge.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'orthomerge\[eval\]'") as problem:
        require_harness()
    assert str(problem.value).count("\n") == 0
