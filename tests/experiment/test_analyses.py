"""What a run keeps for its page is what dense linear algebra says of its adapters."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from conftest import write_task

from orthomerge.adapters import read_adapter
from orthomerge.experiment import Run, parse_recipe
from orthomerge.experiment.analyses import BANDS
from orthomerge.experiment.steps import StatisticsStep, adapter_step, adapter_steps
from orthomerge.io.analyses import BandShares, Curve, Disturbance, EnergySpectrum, read_analyses

FILES = [kind.FILE for kind in (Curve, Disturbance, BandShares, EnergySpectrum)]


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyses")
    tasks = [str(write_task(folder / f"{n}.jsonl", seed=s)) for s, n in enumerate("abc")]
    recipe = parse_recipe(
        {
            "name": "tiny",
            "base": str(tiny_base),
            "tasks": tasks,
            "seeds": [0, 1],
            "data": {"train": 24, "selection": 12, "test": 12, "max_length": 16},
            "adapter": {"rank": 4, "alpha": 8},
            "statistics": {"samples": 6},
            "training": {"epochs": 8, "batch_size": 8, "learning_rate": 5e-3},
            "arms": {
                "default": {"start": "default"},
                "frozen": {"start": "min_eigen", "constraint": "freeze"},
            },
            "merges": [{"method": "task_arithmetic"}],
        }
    )
    run = Run(recipe, folder / "run")
    rows = run.execute()
    return run, rows, read_analyses(folder / "run")


def dense(run, arm, seed):
    """ΔW and S of every task at every layer, float64."""
    steps = adapter_steps(run.exp, arm, seed, 5e-3)
    adapters = [read_adapter(step.path(run.exp)) for step in steps.values()]
    return adapters, list(statistics_of(run).values())


def statistics_of(run):
    steps = StatisticsStep.for_merging(run.exp)
    return {task: run.space.get(step) for task, step in steps.items()}


def test_interference_is_that_of_the_dense_updates(finished):
    run, _, analyses = finished
    assert [(d.arm, d.seed) for d in analyses.disturbances] == [
        (arm, seed) for arm in ("default", "frozen") for seed in (0, 1)
    ]
    for record in analyses.disturbances:
        adapters, stats = dense(run, record.arm, record.seed)
        assert record.tasks == list(run.exp.tasks)
        for layer, found in record.layers.items():
            for j, item in enumerate(stats):
                S = item.second_moment(layer)
                deltas = [a.layers[layer].delta().double() for a in adapters]
                energies = torch.stack([(d @ S @ d.T).trace() for d in deltas])
                expected = (energies / energies[j]).sqrt()
                got = torch.tensor([row[j] for row in found])
                torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_places_are_parts_of_a_in_the_others_eigenbasis(finished):
    run, _, analyses = finished
    tasks = list(run.exp.tasks)
    adapters, stats = dense(run, "frozen", 0)
    mine = [p for p in analyses.shares if p.arm == "frozen"]
    assert {p.seed for p in mine} == {0}
    assert len(mine) == len(tasks) * len(adapters[0].layers)
    for place in mine:
        t = tasks.index(place.task)
        A = adapters[t].layers[place.layer].A.double()
        moments = [s.second_moment(place.layer) for i, s in enumerate(stats) if i != t]
        S = sum(m / len(moments) for m in moments)
        assert isinstance(S, torch.Tensor)
        d, norm = S.shape[0], A.square().sum()
        vectors = torch.linalg.eigh(S).eigenvectors.flip(1)
        energy = (A @ vectors).square().sum(0) / norm
        edges = [round(i * d / BANDS) for i in range(BANDS + 1)]
        expected = [float(energy[a:b].sum()) for a, b in pairwise(edges)]
        assert len(place.others) == BANDS
        assert sum(place.others) == pytest.approx(1, abs=1e-3)
        # Directions without energy have no order: only the loud half is distinguished.
        half = BANDS // 2
        assert place.others[:half] == pytest.approx(expected[:half], abs=2e-3)
        seen = float((A @ S @ A.T).trace() * d / (norm * S.trace()))
        assert place.seen[1] == pytest.approx(seen, rel=1e-2, abs=1e-3)
        own = stats[t].second_moment(place.layer)
        seen = float((A @ own @ A.T).trace() * d / (norm * own.trace()))
        assert place.seen[0] == pytest.approx(seen, rel=1e-2, abs=1e-3)


def test_spectra_fall_and_add_up(finished):
    run, _, analyses = finished
    stats = statistics_of(run)
    assert {s.task for s in analyses.spectra} == set(stats)
    for spectrum in analyses.spectra:
        S = stats[spectrum.task].second_moment(spectrum.layer)
        values = torch.linalg.eigvalsh(S).flip(0) / S.trace()
        expected = [float(values[p - 1]) for p in spectrum.places]
        assert spectrum.own == pytest.approx(expected, rel=1e-2, abs=1e-6)
        assert spectrum.own == sorted(spectrum.own, reverse=True)
        assert spectrum.width == 32


def test_losses_are_those_of_the_trainings(finished):
    run, _, analyses = finished
    assert len(analyses.curves) == 2 * 2 * 3
    for curve in analyses.curves:
        path = adapter_step(run.exp, curve.arm, curve.task, curve.seed, curve.learning_rate).path(
            run.exp
        )
        assert path.is_dir()
        assert [step for step, _ in curve.losses] == [1, 10, 20]


def test_analyses_outlives_its_adapters_and_is_not_made_twice(finished, tmp_path):
    run, _, _ = finished
    output = tmp_path / "copy"
    shutil.copytree(run.output, output)
    before = {name: (output / name).read_bytes() for name in FILES}
    stamps = {name: (output / name).stat().st_mtime_ns for name in FILES}
    shutil.rmtree(output / "adapters")
    shutil.rmtree(output / "stats")
    Run(run.recipe, output).execute()
    assert {name: (output / name).read_bytes() for name in FILES} == before
    assert {name: (output / name).stat().st_mtime_ns for name in FILES} == stamps
    assert not (output / "adapters").exists()
    assert not (output / "stats").exists()


def test_analyses_of_rows_alone_is_none(finished, tmp_path):
    run, _, _ = finished
    output = tmp_path / "rows"
    output.mkdir()
    shutil.copy(run.output / "results.jsonl", output)
    Run(run.recipe, output).execute()
    assert not any((output / name).exists() for name in FILES)
    assert not (output / "adapters").exists()


def test_arms_of_their_own_tasks_and_targets(finished, tmp_path):
    """Such arms have interference among their tasks; spectra are of the recipe's own inputs."""
    run, _, _ = finished
    values = run.recipe.model_dump(exclude_defaults=True)
    tasks = values["tasks"]
    values |= {"seeds": [0], "training": {"epochs": 1, "batch_size": 8}}
    values["arms"] = {
        "default": {"start": "default"},
        "two": {"start": "min_eigen", "tasks": tasks[:2]},
        "keys": {"start": "default", "targets": ["key", "intermediate.dense"]},
    }
    Run(parse_recipe(values), tmp_path / "run").execute()
    analyses = read_analyses(tmp_path / "run")
    assert {d.arm: len(d.tasks) for d in analyses.disturbances} == {
        "default": 3,
        "two": 2,
        "keys": 3,
    }
    assert {p.arm for p in analyses.shares} == {"default", "two"}
