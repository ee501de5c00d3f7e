"""What arms and settings do to starts, training and rows, and what mistakes are told."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
import torch
from conftest import call
from five_architectures import model_of, write_glue
from tiny_recipe import execute, make_recipe

from orthomerge.adapters import read_adapter
from orthomerge.errors import AssetError, OrthomergeError, OrthomergeWarning, RecipeError
from orthomerge.experiment import Run, parse_recipe
from orthomerge.experiment.steps import StartStep, StatisticsStep, TrainStep
from orthomerge.tasks import glue

RATE = 5e-3


@pytest.fixture(scope="module")
def small(tiny_base, tmp_path_factory):
    values = make_recipe(tmp_path_factory.mktemp("arms") / "tasks", tiny_base)
    return values | {"merges": [{"method": "task_arithmetic"}]}


def ran(values, output):
    return execute(values, output), Run(parse_recipe(values), output).space


def factors(folder):
    return read_adapter(folder).layers.items()


def test_a_frozen_B_is_the_start_and_orthonormal_and_A_learns(small, tmp_path):
    arms = {"held": {"start": "default", "constraint": "freeze_B"}}
    rows, space = ran(small | {"arms": arms}, tmp_path / "run")
    assert {r.constraint for r in rows} == {"freeze_B"}
    start = dict(factors(space.get(StartStep("held", "one", 0))))
    for name, trained in factors(space.get(TrainStep("held", "one", 0, RATE))):
        assert trained.B.equal(start[name].B)
        gram = trained.B.double().T @ trained.B.double()
        torch.testing.assert_close(gram, gram.diagonal().mean() * torch.eye(4).double())
        assert float(gram.diagonal().mean()) > 0
        assert not trained.A.equal(start[name].A)


def test_a_gaussian_start_has_PEFTs_deviation_and_an_empty_B(small, tmp_path):
    arms = {"drawn": {"start": "gaussian"}, "default": {"start": "default"}}
    rows, space = ran(small | {"arms": arms}, tmp_path / "run")
    assert {r.start for r in rows if r.arm == "drawn"} == {"gaussian"}
    default = dict(factors(space.get(StartStep("default", "one", 0))))
    entries = []
    for name, begun in factors(space.get(StartStep("drawn", "one", 0))):
        assert not begun.B.any()
        assert not begun.A.equal(default[name].A)
        entries.append(begun.A.flatten())
    drawn = torch.cat(entries)
    # PEFT: a deviation of 1/rank; four standard errors of an estimate from so many entries.
    assert float(drawn.std()) == pytest.approx(1 / 4, rel=4 / (2 * len(drawn)) ** 0.5)


def test_a_batch_in_passes_trains_as_the_whole_batch(small, tmp_path):
    base = shutil.copytree(small["base"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))  # dropout is drawn a pass
    small = small | {"base": str(base)}
    found, losses = {}, {}
    for passes in (1, 2, 4):
        training = small["training"] | {"accumulate": passes, "epochs": 4}
        values = small | {"training": training, "arms": {"default": {"start": "default"}}}
        _, space = ran(values, tmp_path / f"run{passes}")
        found[passes] = dict(factors(space.get(TrainStep("default", "one", 0, RATE))))
        folder = space.get(TrainStep("default", "one", 0, RATE))
        losses[passes] = json.loads((folder / "training.json").read_text())["losses"][-1]
    assert len({loss[0] for loss in losses.values()}) == 1  # of the same step
    for passes in (2, 4):
        # Adam makes much of the rounding of small gradients: 0.106 on torch 2.4.
        for name, whole in found[1].items():
            other = found[passes][name].B - whole.B
            assert float(other.norm()) < 0.2 * float(whole.B.norm())
        assert losses[passes] == pytest.approx(losses[1], rel=1e-3)
    with pytest.raises(OrthomergeError, match="batch_size 8 cannot be cut into 3"):
        parse_recipe(small | {"training": small["training"] | {"accumulate": 3}})


def test_keys_of_version_0_1_are_read_and_say_their_new_names(small):
    old = {"start": "min_eigen", "constraint": "project", "share": 0.7, "room": 6, "quiet": 0.1}
    with pytest.warns(OrthomergeWarning, match="'share' is now 'energy_fraction'"):
        arm = parse_recipe(small | {"arms": {"old": old}}).arms["old"]
    assert (arm.energy_fraction, arm.subspace_dim, arm.low_energy) == (0.7, 6, 0.1)


def test_rows_of_a_projection_say_so_and_depend_on_its_share(small, tmp_path):
    keys = {}
    for share in (0.5, 0.9):
        arm = {"start": "min_eigen", "constraint": "project", "energy_fraction": share}
        rows = execute(small | {"arms": {"kept": arm}}, tmp_path / "run")
        mine = [r for r in rows if r.arm == "kept"]
        assert {r.constraint for r in mine} == {"project"}
        assert {r.solver for r in mine} == {"min_eigen"}
        keys[share] = {r.key for r in mine}
    assert not keys[0.5] & keys[0.9]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.trian=9", ["'trian'", "did you mean 'train'"]),
        ("data.train", ["'data.train' is not key=value", "--set data.train=100"]),
        ("=9", ["'=9' is not key=value"]),
        ("data.train=many", ["data.train"]),
        ("data.train=[1", ["'data.train' cannot be read"]),
        ("data.train.more=9", ["'data.train.more' names no place", "'data.train' has no 'more'"]),
        ("merges.9.method=ties", ["'merges.9.method' names no place", "'merges' has no '9'"]),
        ("merges.0.method=tise", ["'tise'", "did you mean 'ties'"]),
        ("arms.osrm.start=min_eign", ["did you mean 'min_eigen'"]),
        ("training.accumulate=3", ["cannot be cut into 3"]),
    ],
)
def test_a_mistaken_change_is_one_sentence(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OrthomergeError) as caught:
        call("run", "demo.yaml", "--set", change, "--output", tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_glue_of_other_columns_is_told_and_finished_work_is_kept(tmp_path, monkeypatch):
    copy = write_glue(tmp_path / "glue", train=40)
    monkeypatch.setenv(glue.FOLDER_VARIABLE, str(copy))
    values = {
        "name": "columns",
        "base": str(model_of("roberta-large", tmp_path / "base")),
        "tasks": ["glue/cola", "glue/rte"],
        "data": {"train": 24, "selection": 6, "test": 10, "max_length": 16},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": RATE},
        "arms": {"default": {"start": "default"}},
        "merges": [{"method": "task_arithmetic"}],
    }

    def fresh(place):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / place)
        glue.pools.cache_clear()

    fresh("before")
    output = tmp_path / "run"
    rows = execute(values, output)
    kept = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != ".lock"}
    for file in (copy / "rte").glob("*.parquet"):
        other = datasets.Dataset.from_parquet(str(file)).rename_column("sentence2", "hypothesis")
        other.to_parquet(file)
    fresh("after")
    with pytest.raises(AssetError) as caught:
        execute(values, output)
    message = str(caught.value)
    assert "\n" not in message
    assert "'glue/rte' has no column 'sentence2', only " in message and "hypothesis" in message
    assert {p: p.read_bytes() for p in kept} == kept
    fresh("again")
    assert len(execute(values | {"tasks": ["glue/cola", "glue/mrpc"]}, output)) == len(rows)
    glue.pools.cache_clear()


def test_tasks_share_a_draw_where_the_arm_says_so(small, tmp_path):
    plain = {"start": "random_orthonormal"}
    arms = {"own": plain, "shared": plain | {"seed_policy": "shared"}}
    space = Run(parse_recipe(small | {"arms": arms}), tmp_path / "run").space

    def alike(arm: str) -> bool:
        one, other = (
            dict(factors(space.get(StartStep(arm, task, 0)))) for task in ("one", "length")
        )
        return all(one[name].A.equal(other[name].A) for name in one)

    assert alike("shared") and not alike("own")


def test_the_penalty_shares_starts_and_lowers_what_others_get(tmp_path, tiny_base):
    values = make_recipe(tmp_path, tiny_base)
    charged = {"start": "default", "constraint": "penalty", "strength": 100}
    values |= {
        "arms": {
            "default": {"start": "default"},
            "penalty": charged,
            "random": {**charged, "penalty_moment": "random"},
            "osrm": {"start": "min_eigen"},
            "osrm-penalty": {**charged, "start": "min_eigen", "isotropic_share": 0.1},
        },
        "merges": [{"method": "linear"}],
    }
    run = Run(parse_recipe(values), tmp_path / "out")
    rows = run.execute()
    assert {r.constraint for r in rows if "penalty" in r.arm} == {"penalty"}
    exp = run.exp
    task, other = exp.tasks
    start = {a: StartStep(a, task, 0).path(exp) for a in values["arms"]}
    assert start["default"] == start["penalty"] == start["random"]
    assert start["osrm"] == start["osrm-penalty"]
    adapters = {a: TrainStep(a, task, 0, 5e-3).path(exp) for a in values["arms"]}
    assert len(set(adapters.values())) == len(adapters)
    told = {a: json.loads((p / "training.json").read_text()) for a, p in adapters.items()}
    assert "penalties" not in told["default"]
    assert all(value >= 0 for _, value in told["penalty"]["penalties"])
    others = run.space.get(StatisticsStep.for_merging(exp)[other])

    def disturbs(arm):
        updates = {n: f.delta().double() for n, f in factors(adapters[arm])}
        return sum(float((d @ others.second_moment(n) * d).sum()) for n, d in updates.items())

    assert disturbs("penalty") < 0.9 * disturbs("default")
    assert disturbs("osrm-penalty") < 0.9 * disturbs("osrm")
    assert execute(values, tmp_path / "out") == rows  # nothing is made again


@pytest.mark.parametrize(
    "arm",
    [
        {"start": "default", "strength": 1},
        {"start": "default", "constraint": "penalty", "strength": -1},
        {"start": "default", "constraint": "penalty", "penalty_moment": "own"},
        {"start": "default", "constraint": "freeze", "isotropic_share": 0.1},
    ],
)
def test_penalties_that_are_refused(tmp_path, tiny_base, arm):
    values = make_recipe(tmp_path, tiny_base) | {"arms": {"a": arm}}
    with pytest.raises((RecipeError, ValueError)):
        parse_recipe(values)
