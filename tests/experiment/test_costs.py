"""Time and memory of stages."""

from __future__ import annotations

import torch

from orthomerge.experiment.measured import Costs


def test_a_stage_has_the_peak_of_what_was_held_in_it_though_it_is_let_go_of():
    costs = Costs()
    with costs.stage("small"):
        pass
    with costs.stage("large"):
        held = torch.ones(60_000_000)  # 240 MB
        for _ in range(3):
            held += 1
        del held
    assert costs.memory["large"] > costs.memory["small"] + 150e6
    assert costs.seconds["large"] > costs.seconds["small"] >= 0


def test_times_add_up_and_the_largest_peak_stays():
    one = Costs({"train": 1.5}, {"train": 10}, {"train": 7})
    one.add(Costs({"train": 2.0, "eval": 0.5}, {"train": 4, "eval": 6}, {"train": 9}))
    assert one == Costs({"train": 3.5, "eval": 0.5}, {"train": 10, "eval": 6}, {"train": 9})


def test_what_a_stage_took_counts_also_where_it_fails():
    costs = Costs()
    try:
        with costs.stage("train"):
            raise ValueError
    except ValueError:
        pass
    assert set(costs.seconds) == set(costs.memory) == {"train"}
