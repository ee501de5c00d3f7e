"""A few hundred broken inputs of every kind; the page says what the long run found."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import fuzz_runs
import fuzzing
import pytest
import torch
from fuzz_mutate import Target, nothing_but

from orthomerge.adapters import verify
from orthomerge.errors import AdapterError, MergeError, OrthomergeError, RecipeError
from orthomerge.experiment.estimate import read_rates
from orthomerge.experiment.measured import Costs
from orthomerge.experiment.preview import throughput_of_run
from orthomerge.experiment.record import write_record
from orthomerge.factors import LoraFactors
from orthomerge.io.analyses import Disturbance, read_analyses
from orthomerge.io.files import append_lines, fingerprint
from orthomerge.merging import merge_layers
from orthomerge.models.assets import ResolvedModel
from orthomerge.report.analyses import mean_disturbance
from orthomerge.report.trials import build_trials_page

# Whole pages are made of what is read.
SLOW = ("run.json", "evidence of a run", "weights.json of a search")


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> list[fuzzing.Target]:
    return fuzzing.targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("place", range(fuzzing.TARGETS))
def test_broken_inputs_are_refused_in_a_sentence(targets, place):
    inputs = 15 if targets[place].name in SLOW else 200
    found = fuzzing.fuzz(targets[place], inputs, seed=11)
    assert found["problems"] == {}
    assert found["accepted"] + found["refused"] == inputs
    if targets[place].name != "jobs.jsonl":  # which nobody reads: it is only added to
        assert found["refused"] > inputs / 10  # the mutator breaks something
    assert found["accepted"] > 0  # and not everything


def test_the_fuzzer_sees_what_is_not_caught():
    def once(rng):
        raise KeyError(rng.random() < 2)

    assert fuzzing.fuzz(Target("broken", 1.0, once), 3)["uncaught"] == 3


def test_the_fuzzer_sees_hangs_and_what_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "LIMIT_S", 0.05)

    def hang(rng):
        try:
            while True:
                pass
        except OSError as problem:  # as readers do
            raise OrthomergeError("refused") from problem

    def leave(rng):
        (tmp_path / "half").write_text("x")
        nothing_but(tmp_path, set())

    found = fuzzing.fuzz(Target("hangs", 1.0, hang), 2)
    assert found["hangs"] == found["uncaught"] == 2
    found = fuzzing.fuzz(Target("leaves", 1.0, leave), 2)
    assert found["half"] == found["uncaught"] == 2


def test_every_kind_is_a_target(targets):
    assert len(targets) == fuzzing.TARGETS
    assert sum(t.share for t in targets) == pytest.approx(1)


def test_the_page_holds_the_table_of_the_last_long_run():
    assert fuzzing.page() in fuzzing.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("place, number", [(4, 9217)])
def test_what_came_out_uncaught_once_is_refused(targets, place, number):
    """Inputs of a long run, by their numbers."""
    with pytest.raises(OrthomergeError):
        targets[place].once(random.Random(f"0 {targets[place].name} {number}"))


# What the fuzzer found ---------------------------------------------------------------------------


def test_a_task_type_that_peft_has_not_is_refused_before_anything_is_written(tmp_path):
    from hostile_files import write_adapter

    from orthomerge import merge_adapters

    folder = write_adapter(tmp_path / "a", task_type="\0")
    with pytest.raises(AdapterError, match="'task_type'"):
        merge_adapters([folder], output=tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{"layer_weights": "x"}, {"statistics": ["x"]}, {"seed": float("inf")}]
)
def test_a_record_of_other_types_cannot_be_done_again(tmp_path, changes):
    from hostile_files import write_adapter

    from orthomerge import merge_adapters

    folder = write_adapter(tmp_path / "a")
    merge_adapters([folder], output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    record = {k: v for k, v in record.items() if k != "sha256"} | changes
    (tmp_path / "out" / "merge.json").write_text(
        json.dumps({**record, "sha256": fingerprint(record)})
    )
    with pytest.raises(AdapterError, match="how to merge again"):
        verify(tmp_path / "out", redo=True, adapters=[folder])


@pytest.mark.parametrize("layer", ["(a+)+$", "[", "a b|c", "x*y.query"])
def test_a_layer_whose_name_is_an_expression_is_read_back(tmp_path, layer):
    """Of another rank than the rest, so that the pattern of ranks has its name."""
    from hostile_files import PREFIX, tensors, write_adapter

    from orthomerge import merge_adapters

    own = {
        f"{PREFIX}{layer}.lora_{n}.weight": torch.ones(s) for n, s in (("A", (2, 1)), ("B", (1, 2)))
    }
    folder = write_adapter(tmp_path / "a", values={**tensors(), **own})
    merged = merge_adapters([folder], output=tmp_path / "out")
    assert torch.equal(merged.dense(layer), torch.full((1, 1), 4.0))
    pattern = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    assert len(pattern) == 1
    assert all(c.good for c in verify(tmp_path / "out", redo=True))


@pytest.mark.parametrize("record", ["[]", "5", "{", "\\", "[" * 5000])
def test_a_conversion_of_no_record_is_not_trained(tmp_path, record):
    from hostile_files import write_adapter

    from orthomerge.training import TrainingSettings, recover_adapter

    (write_adapter(tmp_path / "a") / "convert.json").write_text(record)
    with pytest.raises(AdapterError, match=r"convert\.json.*altered"):
        recover_adapter(
            None, tmp_path / "a", [], None, regression=False, settings=TrainingSettings(),
            output=tmp_path / "out",
        )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "name, change",
    [
        ("interference.jsonl", {"matrix": [[1.0]]}),
        ("interference.jsonl", {"layers": {"l": [[1.0, 2.0], [1.0]]}}),
        ("spectra.jsonl", {"own": [1.0]}),
        ("subspaces.jsonl", {"seen": [1.0]}),
        ("training.jsonl", {"losses": [[1.0]]}),
        ("training.jsonl", {"losses": [[float("inf"), 1.0]]}),
    ],
)
def test_analyses_whose_parts_are_not_of_one_size_is_refused(tmp_path, name, change):
    honest = {r.FILE: asdict(r) for r in fuzz_runs.EVIDENCE}[name]
    lines = [honest | change, honest, honest]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(OrthomergeError, match=f"line 1 of .*{name}"):
        read_analyses(tmp_path)


def test_seeds_of_other_tasks_have_no_part_in_the_mean():
    first, second = (fuzz_runs.EVIDENCE[0], Disturbance("o", "a", 1, 0.1, "token", ["x"], [[1.0]]))
    assert mean_disturbance([first, second])["matrix"] == first.matrix


@pytest.mark.parametrize(
    "changes", [{"method": {}}, {"tasks": [1, 2]}, {"trials": [{}]}, {"settings": None}]
)
def test_a_record_of_no_search_has_no_page(tmp_path, changes):
    (tmp_path / "weights.json").write_text(json.dumps(fuzz_runs.SEARCH | changes))
    with pytest.raises(OrthomergeError, match=r"weights.json"):
        build_trials_page(tmp_path)
    assert not (tmp_path / "trials.html").exists()


@pytest.mark.parametrize(
    "record",
    ['{"seconds": [1]}', '{"seconds": {"train": "1"}}', '{"peak_memory": {"train": null}}',
     '{"seconds": {"train": 1e999}}', "[" * 5000],
)  # fmt: skip
def test_a_run_begins_a_broken_record_anew(tmp_path, record):
    (tmp_path / "run.json").write_text(record)
    base = ResolvedModel("tiny", "path", tmp_path, "a" * 64, "tiny")
    costs = Costs({"train": 2.0})
    write_record(tmp_path / "run.json", {"started": "now", "base": "t"}, base, [], costs)
    assert json.loads((tmp_path / "run.json").read_text())["seconds"] == {"train": 2.0}


@pytest.mark.parametrize(
    "values",
    [{"rates": {"train": "1"}}, {"rates": {"train": 1.0, "eval": 0}}, {"rates": {"eval": 1.0}},
     {"seconds": {"train": 1.0}, "recipe": 5}, {"seconds": [], "recipe": "x"}],
)  # fmt: skip
def test_a_file_of_no_throughput_is_refused(tmp_path, values):
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(RecipeError, match="throughput"):
        read_rates(tmp_path / "t.json")


@pytest.mark.parametrize("recipe, said", [("a: [", "cannot be read"), ("name: x", "base")])
def test_a_run_of_no_recipe_gives_no_throughput(recipe, said):
    with pytest.raises(RecipeError, match=said):
        throughput_of_run({"seconds": {"train": 1.0}, "recipe": recipe}, "run.json")


def test_a_journal_of_deep_nesting_is_added_to(tmp_path):
    (tmp_path / "j").write_text("{}\n" + "[" * 100_000)
    append_lines(tmp_path / "j", ["1"])
    assert (tmp_path / "j").read_text() == "{}\n1\n"


@pytest.mark.parametrize("rank", [None, 1])
def test_a_merge_that_overflows_is_refused(rank):
    factors = LoraFactors(torch.full((2, 4), 1e19), torch.full((3, 2), 1e19), 1.0)
    with pytest.raises(MergeError, match="layer 'q'"):
        merge_layers([{"q": factors}] * 2, method="ties", rank=rank)
