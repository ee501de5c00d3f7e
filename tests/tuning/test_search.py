"""The search finds what is there, goes on where it stopped, and refuses what does not belong."""

from __future__ import annotations

import builtins
import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
import torch
from conftest import call, tiny_bert, write_task
from small_adapters import make_adapter

from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, OrthomergeError
from orthomerge.evaluation.classification import Evaluator, score
from orthomerge.merging import MergeConfig, merge_layers
from orthomerge.models.loading import load_tokenizer
from orthomerge.statistics import collect_statistics
from orthomerge.tasks import get_task
from orthomerge.tuning import Method, SearchSettings, read_inputs, search_weights
from orthomerge.tuning.study import LOCK, STUDY

NAMES = {"a": 1, "b": 2}


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    """Two adapters with heads, and a task file for each."""
    folder = tmp_path_factory.mktemp("search")
    for name, seed in NAMES.items():
        make_adapter(folder / name, tiny_base, seed)
        write_task(folder / f"{name}.jsonl", seed=seed + 5)
    return folder


def arguments(files, *more):
    return [files / "a", files / "b", "--task", files / "a.jsonl", "--task", files / "b.jsonl",
            "--rows", 12, *more]  # fmt: skip


def inputs_of(files, rows=12):
    return read_inputs(
        [files / n for n in NAMES], [str(files / f"{n}.jsonl") for n in NAMES], rows=rows
    )


def test_the_command_writes_the_best_weights_their_merge_and_a_page(files, tmp_path):
    out = tmp_path / "out"
    found = json.loads(call("tune", *arguments(files, "--trials", 9, "-o", out, "--json")))
    record = json.loads((out / "weights.json").read_text())
    assert {k: found[k] for k in record} == record
    values = [t["value"] for t in record["trials"]]
    assert record["score"] == max(values)
    assert record["best"] == values.index(max(values))
    starts = [t["weights"] for t in record["trials"][:6]]
    assert starts == [[w, w] for w in (1.0, 0.5, 0.2, 0.4, 0.6, 0.8)]
    assert all(0 <= w <= 1.5 for t in record["trials"] for w in t["weights"])
    # The score can be had again from what the record says, on the selection rows it says.
    read = [read_adapter(a["path"]) for a in record["adapters"]]
    merged = merge_layers([a.layers for a in read], weights=record["weights"])
    evaluator = Evaluator(record["base_model"]["name"], load_tokenizer(read[0].base_model or ""))
    for task, adapter, name in zip(record["tasks"], read, NAMES, strict=True):
        rows = get_task(str(files / f"{name}.jsonl")).data(selection=12).selection
        said = evaluator.predict(
            rows, merged.layers, adapter.modules, num_labels=2, regression=False
        )
        again = score("classification", said, [r.label for r in rows], 2)[task["metric"]]
        assert task["score"] == pytest.approx(again)
    written = read_adapter(out / "merged")
    for name in merged.layers:
        assert (written.layers[name].delta() - merged.dense(name)).abs().max() < 1e-6
    page = (out / "trials.html").read_text()
    assert "Score against each weight" in page
    assert "Plotly" in page
    assert "<script src" not in page


def test_a_search_that_stopped_goes_on_as_it_would_have(files, tmp_path):
    inputs = inputs_of(files)

    def trials(folder, *counts):
        for count in counts:
            found = search_weights(
                inputs, tmp_path / folder, settings=SearchSettings(trials=count, seed=3)
            )
        return [(t.weights, t.tasks) for t in found.trials]

    whole = trials("whole", 13)
    assert trials("parts", 2, 8, 13) == whole
    assert len(whole) == 13
    assert trials("whole", 5) == whole  # enough already: nothing is tried


def test_a_killed_run_leaves_a_study_that_is_gone_on_with(files, tmp_path):
    inputs, out = inputs_of(files), tmp_path / "out"
    search_weights(inputs, out, settings=SearchSettings(trials=1))
    study = optuna.load_study(study_name="weights", storage=f"sqlite:///{out / STUDY}")
    lost = study.ask()  # a run takes the second start and dies
    assert lost.number == 1
    found = search_weights(inputs, out, settings=SearchSettings(trials=7))
    assert len(found.trials) == 7
    assert [0.5, 0.5] in [t.weights for t in found.trials]
    assert len({tuple(t.weights) for t in found.trials}) == 7


def test_weights_by_group_of_layers_are_layer_weights(files, tmp_path):
    found = search_weights(
        inputs_of(files), tmp_path / "o", settings=SearchSettings(trials=8, groups=2)
    )
    assert len(found.layer_weights) == 2
    assert all(len(t.weights) == 4 for t in found.trials)
    assert found.labels[0] == "a, part 1 of 2"
    flat = [w for weights in found.layer_weights.values() for w in weights]
    assert flat == next(t.weights for t in found.trials if t.number == found.best)
    other = search_weights(
        inputs_of(files),
        tmp_path / "ties",
        method=Method(MergeConfig("ties", options={"density": 0.5})),
        settings=SearchSettings(trials=2),
    )
    assert other.weights in ([1.0, 1.0], [0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--task", "sentiment"], ["3 tasks for 2 adapters", "--task"]),
        (["--method", "tis"], ["'ties'"]),
        (["--method", "ties", "--option", "densty=1"], ["did you mean 'density'"]),
        (["--method", "ties", "--option", "density=7"], ["density", "7"]),
        (["--method", "fisher"], ["needs Fisher information"]),
        (["--groups", 3], ["3 groups", "2 blocks"]),
        (["--low", 2], ["2 to 1.5"]),
        (["--low", "nan"], ["nan"]),
        (["--rows", 500], ["500"]),
        (["--base", "./nowhere"], ["no model"]),
        (["--objective", "entrpy"], ["did you mean 'entropy'"]),
        (["--layerwise"], ["--objective entropy"]),
        (["--objective", "entropy", "--method", "ties"], ["--method"]),
        (["--objective", "entropy", "--groups", 2], ["--layerwise"]),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(files, tmp_path, change, words):
    with pytest.raises(OrthomergeError) as caught:
        call("tune", *arguments(files, "--trials", 1, "-o", tmp_path / "x", *change))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "x").exists()


def test_statistics_of_another_model_or_for_nothing_are_refused_before_the_first_trial(
    files, tmp_path
):
    stats = tmp_path / "s.stats.safetensors"
    ids = torch.arange(5, 17).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    collect_statistics(tiny_bert(), [batch], ["query"], model_sha256="0" * 64).save(stats)
    given = arguments(
        files, "--trials", 1, "--stats", stats, "--stats", stats, "-o", tmp_path / "x"
    )
    for method, words in (("regmean", "are not those of"), ("ties", "takes no statistics")):
        with pytest.raises(OrthomergeError, match=words):
            call("tune", *given, "--method", method)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--method", "ties"], ["another method"]),
        (["--high", "2"], ["another range of weights"]),
        (["--rows", "11"], ["another rows"]),
        (["--seed", "1"], ["another", "seed"]),
    ],
)
def test_a_study_of_something_else_is_refused(files, tmp_path, change, words):
    call("tune", *arguments(files, "--trials", 1, "-o", tmp_path / "x"))
    before = (tmp_path / "x" / "weights.json").read_bytes()
    with pytest.raises(OrthomergeError) as caught:
        call("tune", *arguments(files, "--trials", 2, "-o", tmp_path / "x", *change))
    assert all(word in str(caught.value) for word in [*words, "choose another --output"])
    assert (tmp_path / "x" / "weights.json").read_bytes() == before


def test_folders_that_are_not_ours_are_left_alone(files, tmp_path):
    (tmp_path / "theirs").write_text("mine")
    with pytest.raises(OrthomergeError, match="holds no study"):
        call("tune", *arguments(files, "-o", tmp_path))
    with pytest.raises(OrthomergeError, match="is a file"):
        call("tune", *arguments(files, "-o", tmp_path / "theirs"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / STUDY).write_text("no database at all")
    with pytest.raises(OrthomergeError, match="cannot be used as a study"):
        call("tune", *arguments(files, "-o", tmp_path / "broken"))


def test_a_study_that_another_run_is_about_to_make_is_waited_for(files, tmp_path):
    """A run that starts first leaves its lock before there is a study."""
    (tmp_path / LOCK).touch()
    call("tune", *arguments(files, "--trials", 1, "-o", tmp_path))
    assert _count(tmp_path) == 1


def test_without_optuna_the_way_out_is_named(files, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(OrthomergeError, match=r"pip install 'orthomerge\[tune\]'"):
        call("tune", *arguments(files, "-o", tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_runs_at_once_share_a_study_and_a_killed_one_leaves_it_whole(files, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "orthomerge", "tune"]
    command += [str(a) for a in arguments(files, "--trials", 400, "-o", out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    runs = [subprocess.Popen(command, **quiet) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while _count(out) < 20 and time.monotonic() < deadline:
            assert all(run.poll() is None for run in runs)
            time.sleep(0.1)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    done = _count(out)
    assert done >= 20
    assert not (out / "weights.json").exists()
    found = search_weights(inputs_of(files), out, settings=SearchSettings(trials=done + 3))
    assert len(found.trials) == done + 3
    starts = [[w, w] for w in (1.0, 0.5, 0.2, 0.4, 0.6, 0.8)]
    assert all(start in [t.weights for t in found.trials] for start in starts)


def _count(folder) -> int:
    """Trials that are complete, as another program sees them."""
    file = folder / STUDY
    if not file.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as base:
        try:
            return base.execute("select count(*) from trials where state='COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def test_merge_finds_its_weights_first_when_asked(files, tmp_path):
    """`merge --tune validation`: the output is the merge at the weights of the study beside it."""
    out = tmp_path / "merged"
    tasks = ["--task", files / "a.jsonl", "--task", files / "b.jsonl"]
    call("merge", files / "a", files / "b", "-o", out, "--tune", "validation", *tasks,
         "--trials", 7, "--rows", 12)  # fmt: skip
    study = tmp_path / "merged.tune"
    best = json.loads((study / "weights.json").read_text())
    weights = [a["weight"] for a in json.loads((out / "merge.json").read_text())["adapters"]]
    assert weights == best["weights"]
    assert (study / "trials.html").is_file()
    ours, theirs = read_adapter(out).layers, read_adapter(study / "merged").layers
    for layer in theirs:
        assert (ours[layer].delta() == theirs[layer].delta()).all()


@pytest.mark.parametrize("verb", [["tune", "-o"], ["merge", "--tune", "validation", "-o"]])
def test_adapters_that_answer_in_words_are_refused_in_a_sentence(files, tmp_path, verb):
    words = shutil.copytree(files / "a", tmp_path / "words")
    config = json.loads((words / "adapter_config.json").read_text())
    (words / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    command, *more = verb
    task = ["--task", files / "a.jsonl"]
    with pytest.raises(AdapterError, match=r"\(CAUSAL_LM\), and weights .* choose_from") as caught:
        call(command, words, words, *task, *task, *more, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
