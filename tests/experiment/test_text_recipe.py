"""A recipe of tasks in words, from statistics to rows, on a tiny decoder and encoder-decoder."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import call, write_task
from tiny_recipe import check_journal, execute, journal, untimed
from tiny_text import easy_task, regression_task, save_tiny

from orthomerge.adapters import read_adapter
from orthomerge.errors import AssetError, OrthomergeError, RecipeError, TaskError
from orthomerge.evaluation.text import TextEvaluator
from orthomerge.experiment import Run, dry_run, parse_recipe
from orthomerge.experiment.estimate import work_by_stage
from orthomerge.experiment.executors import SerialExecutor
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.preview import Preview
from orthomerge.experiment.steps import StatisticsStep
from orthomerge.fisher import load_fisher
from orthomerge.io.rows import SINGLE, read_rows
from orthomerge.models.loading import load_language_model
from orthomerge.statistics import Statistics

KINDS = {"CAUSAL_LM": ["q_proj", "v_proj"], "SEQ_2_SEQ_LM": ["q", "v"]}
METHODS = ("regmean", "osrm_aware", "fisher", "emr")
TEMPLATE = "{text}\nAnswer:"


def make(folder, kind):
    folder.mkdir(exist_ok=True)
    tasks = [
        str(easy_task(folder / "a.jsonl", ("king", "queen"), 90, seed=0)),
        str(easy_task(folder / "b.jsonl", ("red", "blue"), 90, seed=1)),
        str(regression_task(folder / "length.jsonl", 90)),
    ]
    return {
        "name": "words",
        "base": str(save_tiny(folder / "base", seq2seq=kind == "SEQ_2_SEQ_LM")),
        "tasks": tasks,
        "form": "text",
        "text": {"templates": {tasks[0]: TEMPLATE, tasks[1]: TEMPLATE}},
        "seeds": [0],
        "data": {"train": 24, "selection": 8, "test": 10},
        "adapter": {"rank": 4, "alpha": 8, "targets": KINDS[kind]},
        "statistics": {"samples": 6},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2},
        "arms": {
            "default": {"start": "default", "tasks": 2},
            "osrm": {"start": "contrastive", "constraint": "project"},
            "moved": {"start": "default", "convert": {"from": "default", "recover": 2}},
        },
        "merges": [{"method": method} for method in METHODS[:-1]]
        + [{"method": "emr", "choose_from": [0.5]}],
        "save_merged": True,
    }


@pytest.fixture(scope="module", params=list(KINDS))
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    values = make(folder, request.param)
    return values, execute(values, folder / "run"), folder / "run", request.param


def test_every_row_says_how_it_was_asked_and_answered(finished):
    values, rows, output, _kind = finished
    assert rows == read_rows(output / "results.jsonl")
    assert {r.method for r in rows} == {SINGLE, *METHODS}
    assert {r.arm for r in rows} == set(values["arms"])
    for row in rows:
        assert row.form == "text" and row.metrics[row.metric] == row.value
        assert row.scoring == ("generation" if row.task == "length" else "likelihood")
        assert ("accuracy_normalised" in row.metrics) == (row.scoring == "likelihood")
        assert ("answered" in row.metrics) == (row.scoring == "generation")


def test_pieces_are_a_language_models_and_of_prompts(finished):
    _values, _rows, output, kind = finished
    for part in ("starts", "adapters", "merged"):
        for file in (output / part).rglob("adapter_config.json"):
            adapter = read_adapter(file.parent)
            assert adapter.config["task_type"] == kind, file
            assert not adapter.modules and adapter.layers
    for file in (output / "stats").iterdir():
        assert Statistics.load(file, lazy=True).meta.form == "text"
    found = list((output / "fisher").rglob("*.safetensors"))
    assert found and all(load_fisher(file).meta.form == "text" for file in found)
    for file in (output / "adapters").rglob("adapter_model.safetensors"):
        assert all(f.B.any() for f in read_adapter(file.parent).layers.values())


def test_a_rows_score_is_that_of_the_command_on_the_kept_folder(finished):
    values, rows, output, _kind = finished
    merged = [
        f
        for f in (output / "merged" / "osrm" / "seed0").iterdir()
        if f.name.startswith("regmean-w1-")
    ]
    own = list((output / "adapters" / "osrm" / "seed0").glob("b-*"))
    for (folder,), method in ((merged, "regmean"), (own, SINGLE)):
        row = next(
            r for r in rows if (r.arm, r.task, r.method, r.split) == ("osrm", "b", method, "test")
        )
        said = call("eval", folder, "--task", values["tasks"][1], "--form", "text", "--template",
                    TEMPLATE, "--rows", 10, "--base", values["base"], "--json")  # fmt: skip
        assert json.loads(said)["metrics"] == pytest.approx(row.metrics)


def test_a_finished_run_does_nothing_again_and_rows_alone_go_on(finished, tmp_path):
    values, rows, output, _kind = finished
    before = len(journal(output))
    assert execute(values, output) == rows
    assert len(journal(output)) == before
    kept = values | {"save_merged": False}
    (tmp_path / "r").mkdir()
    lines = (output / "results.jsonl").read_text().splitlines(keepends=True)
    lost = next(i for i, r in enumerate(rows) if r.method == "fisher" and r.arm == "default")
    (tmp_path / "r" / "results.jsonl").write_text("".join(lines[:lost] + lines[lost + 1 :]))
    again = execute(kept, tmp_path / "r")
    assert untimed(again) == untimed(rows)
    kinds = [job.split("/")[0] for job in check_journal(tmp_path / "r")]
    assert sorted(kinds) == sorted(["starts", "adapters", "fisher"] * 2 + ["merge"])


class _Stopped(Exception):
    pass


class _StopsAfter(SerialExecutor):
    """Does so many jobs, then the machine goes away."""

    def __init__(self, jobs):
        self._left = jobs

    def carry_out(self, schedule, space):
        perform = space.perform

        def counted(step, emit):
            if not self._left:
                raise _Stopped
            self._left -= 1
            return perform(step, emit)

        space.perform = counted
        super().carry_out(schedule, space)


def test_a_stopped_run_goes_on_to_the_same_rows(finished, tmp_path):
    values, rows, _output, _kind = finished
    values = values | {"arms": {"default": values["arms"]["default"]}, "save_merged": False}
    rows = [row for row in rows if row.arm == "default"]
    for jobs in (3, 4):
        with pytest.raises(_Stopped):
            Run(parse_recipe(values), tmp_path / "r", executor=_StopsAfter(jobs)).execute()
    assert 0 < len(check_journal(tmp_path / "r")) == 3 + 4
    assert untimed(execute(values, tmp_path / "r")) == untimed(rows)
    check_journal(tmp_path / "r")


def test_scoring_and_prompts_are_part_of_what_a_row_depends_on(finished, tmp_path):
    values, rows, output, _kind = finished
    shutil.copytree(output, tmp_path / "r")
    few = values | {"arms": {"default": values["arms"]["default"]}}
    written = few | {"text": values["text"] | {"scoring": "generation"}}
    exp = Experiment(parse_recipe(written), tmp_path / "r")
    before = len(journal(tmp_path / "r"))
    again = execute(written, tmp_path / "r")
    assert {r.scoring for r in again} == {"generation"}
    assert {r.key for r in again}.isdisjoint(r.key for r in rows)
    done = [line["job"] for line in journal(tmp_path / "r")[before:] if line["event"] == "done"]
    assert {job.split("/")[0] for job in done} == {"eval", "merge"}  # nothing is trained again
    # Another prompt is another training; a classifier's keys know of neither.
    other = Experiment(parse_recipe(few | {"text": {}}), tmp_path)
    statistics = StatisticsStep.for_merging(exp)["a"]
    assert other.key(statistics) != exp.key(statistics)
    plain = {k: v for k, v in few.items() if k not in ("form", "text")}
    plain["data"] = few["data"] | {"max_length": 128}
    classifier = Experiment(parse_recipe(plain), tmp_path)
    assert classifier.scoring_of("a") is None and not classifier.prompts


def test_a_plan_and_a_dry_run_count_words_too(finished, tmp_path):
    values, rows, output, kind = finished
    recipe = parse_recipe(values)
    assert dry_run(recipe, output).jobs == {}
    found = dry_run(recipe, tmp_path / "new")
    assert (found.jobs["train"], found.jobs["convert"]) == (2 + 3, 2)
    plain = {k: v for k, v in values.items() if k not in ("form", "text")}
    plain["data"] = values["data"] | {"max_length": 128}
    classes = dry_run(parse_recipe(plain), tmp_path / "new")
    words, other = (Preview(r, tmp_path).size() for r in (recipe, parse_recipe(plain)))
    # The output layer is multiplied with at every token; this T5 shares its embedding with it.
    output = words.output
    assert found.rows == classes.rows >= len(rows)
    assert words.multiplied - other.multiplied == output > 0
    assert words.parameters - other.parameters == (output if kind == "CAUSAL_LM" else 0)
    more = found.kinds["train"].memory - classes.kinds["train"].memory
    assert (more > 8 * 128 * 8 * words.predicted > 0) == (kind == "CAUSAL_LM")


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"form": "words"}, RecipeError, "form 'words': valid: classifier, text"),
        ({"form": "classifier"}, RecipeError, "add 'form: text'"),
        ({"text": {"scoring": "guess"}}, RecipeError, "'text.scoring' is 'guess'"),
        ({"text": {"template": "x"}}, RecipeError, "did you mean 'templates'"),
        ({"text": {"templates": {"c": TEMPLATE}}}, RecipeError, "text.templates"),
        ({"text": {"templates": {0: "Say:"}}}, TaskError, r"has no \{text\}"),
        ({"data": {"train": 24, "selection": 8, "test": 10, "max_length": 4}}, TaskError,
         "no room for a text in 4 tokens"),
        ({"base": "minilm", "adapter": {"targets": ["query"]}}, AssetError, "writes no text"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, tmp_path_factory, change, error, word
):
    values = make(tmp_path_factory.mktemp("refused"), "CAUSAL_LM")
    told = change.get("text", {}).get("templates", {})
    if 0 in told:
        change = {"text": {"templates": {values["tasks"][0]: told[0]}}}
    with pytest.raises(error, match=word):
        execute(values | change, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_prompts_length_is_the_default_of_words_alone(tmp_path):
    values = make(tmp_path / "words", "CAUSAL_LM")
    assert parse_recipe(values).data.max_length == 128
    assert parse_recipe(values | {"data": {"max_length": 64}}).data.max_length == 64
    plain = {k: v for k, v in values.items() if k not in ("form", "text")}
    plain["tasks"] = [str(write_task(tmp_path / "x.jsonl")), *values["tasks"]]
    assert parse_recipe(plain).data.max_length == 48
    with pytest.raises(OrthomergeError):
        parse_recipe(values | {"data": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_the_passes_that_scoring_takes(tmp_path, kind):
    values = make(tmp_path, kind)
    template = {"prompt": TEMPLATE, "answers": ["not at all so", "yes indeed"]}
    values |= {"tasks": values["tasks"][1:], "arms": {"default": {"start": "default"}}}
    values["text"] = {"templates": {values["tasks"][0]: template}}
    recipe = parse_recipe(values)
    written = parse_recipe(values | {"text": values["text"] | {"scoring": "generation"}})
    previews = [Preview(r, tmp_path / "run") for r in (recipe, written)]
    ours, theirs = (work_by_stage(p, p.whole())["eval"] for p in previews)
    exp = previews[0]
    task, seen = next(iter(exp.prompts)), []
    model = load_language_model(values["base"])
    model.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(named.get("input_ids")), with_kwargs=True
    )
    rows = exp.data[task].test
    TextEvaluator(model, exp.tokenizer).likelihoods(rows, exp.prompts[task])
    # The encoder's passes are not this model's own: it is given what was encoded once.
    passes = 1 if seen[0] is None else sum(map(len, seen)) / len(rows)
    assert passes == {"CAUSAL_LM": 2, "SEQ_2_SEQ_LM": 1}[kind]
    # As many scores of each of the two tasks; numbers are written, at a pass a row.
    assert ours / theirs == pytest.approx((passes + 1) / 2)


def test_a_chat_and_the_bases_precision_make_other_statistics(tmp_path):
    values = make(tmp_path, "CAUSAL_LM")

    def recipe_and_key(**changes):
        exp = Experiment(parse_recipe({**values, **changes}), tmp_path / "out")
        return exp.recipe, next(iter(StatisticsStep.for_merging(exp).values())).key(exp)

    plain, key = recipe_and_key()
    chat, of_chat = recipe_and_key(text={**values["text"], "chat": True})
    for task in values["tasks"]:
        assert chat.prompt_of(task).chat and not plain.prompt_of(task).chat
    training = {**values["training"], "precision": "float32"}
    assert recipe_and_key(training=training)[1] == key
    of_bf16 = recipe_and_key(training={**training, "precision": "bf16"})[1]
    assert len({key, of_chat, of_bf16}) == 3
