"""The whole diagnosis, its advice, and the weight found without labels."""

from __future__ import annotations

import pytest
import torch
from test_interference import made

from orthomerge.adapters import Adapter
from orthomerge.diagnostics import (
    Evidence,
    best_weight,
    best_weight_of_sum,
    couplings,
    diagnose,
    evidence,
    shift_of_sum,
)
from orthomerge.diagnostics.advice import advise
from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors


def trio():
    adapters, stats, _ = zip(*(made(s) for s in range(3)), strict=True)
    return list(adapters), list(stats)


def test_the_best_weight_of_the_sum_is_the_lowest_of_a_grid():
    found = couplings(*trio())
    best = best_weight_of_sum(found)
    grid = [shift_of_sum(found, [w / 100] * 3).mean for w in range(301)]
    assert best.shift.mean <= min(grid) + 1e-4
    assert best.shift.mean == pytest.approx(shift_of_sum(found, [best.weight] * 3).mean)
    assert best.untuned.mean == pytest.approx(grid[100])


def test_the_search_over_merges_finds_what_the_closed_form_finds():
    adapters, stats = trio()
    seen = []
    found = best_weight(
        adapters, stats, method="task_arithmetic", progress=lambda *at: seen.append(at)
    )
    closed = best_weight_of_sum(couplings(adapters, stats))
    assert found.shift.mean == pytest.approx(closed.shift.mean, abs=2e-3)
    assert seen and all(done <= of for done, of in seen)


def test_without_statistics_there_are_only_the_factors_and_what_they_show():
    (a, _, _), (b, _, _) = made(0), made(1)
    loud = {n: LoraFactors(f.A, f.B * 50, f.scaling) for n, f in b.layers.items()}
    found = diagnose([a, Adapter("loud", loud), Adapter("twin", dict(a.layers))])
    assert found.interference is None and found.plain is None and not found.advice
    assert any("loud is" in note and "times as large" in note for note in found.notes)
    assert any("a0 and twin began from one A" in note for note in found.notes)
    assert "interference" not in found.record()


def test_advice_is_given_only_where_the_study_bears_it_out(monkeypatch):
    from orthomerge.diagnostics import advice as module

    adapters, stats = trio()
    noise = {n: LoraFactors(f.A * 9, f.B, f.scaling) for n, f in adapters[2].layers.items()}
    adapters[2] = Adapter("shouting", noise)
    found = couplings(adapters, stats)
    plain = best_weight_of_sum(found)
    monkeypatch.setattr(module, "borne_out", lambda kind: True)
    lines = advise(found, plain, {})
    assert {"weight", "leave_out"} <= {line.kind for line in lines}
    for line in lines:
        assert line.after < line.before
    without = next(line for line in lines if line.kind == "leave_out")
    assert "shouting" in without.text
    monkeypatch.setattr(module, "borne_out", lambda kind: False)
    assert advise(found, plain, {}) == []


def test_the_study_behind_the_advice_beats_plain_cosine_for_merges():
    found = evidence("merges")
    assert found is not None and found.holds and found.rho > found.cosine
    assert found.interval[0] < found.rho < found.interval[1]
    assert f"{found.rho:.2f}" in str(found)


def test_an_adapter_that_does_nothing_gives_no_weight():
    adapters, stats = trio()
    silent = {
        n: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for n, f in adapters[0].layers.items()
    }
    with pytest.raises(MergeError, match="leave it out"):
        best_weight_of_sum(couplings([Adapter("silent", silent), *adapters[1:]], stats))


def test_a_kind_of_advice_needs_an_interval_above_zero_and_above_the_cosines():
    assert Evidence(0.8, (0.6, 0.9), 0.1, (0.3, 0.9), 10).holds
    assert not Evidence(0.8, (0.6, 0.9), 0.7, (-0.1, 0.3), 10).holds
    assert not Evidence(0.1, (-0.2, 0.4), -0.5, (0.1, 0.9), 10).holds
    assert evidence("what nobody measured") is None
