"""The weight where none is given: a merge then has about the size of one of its adapters."""

from __future__ import annotations

import pytest
import torch
from small_merges import SHAPES, adapter, needs, three

from orthomerge.factors import LoraFactors
from orthomerge.merging import MergeConfig, list_methods, merge_layers
from orthomerge.moments import SecondMoment

COUNT, SHAPE = 8, (64, 48)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Statistics:
    def __init__(self, seed: int) -> None:
        self.rows = draw(100 + seed, 200, SHAPE[1])

    def moment(self, layer: str) -> SecondMoment:
        return SecondMoment(SHAPE[1]).update(self.rows)


# slerp takes two; model_stock keeps what runs of one task share, which these do not.
@pytest.mark.parametrize(
    "method",
    [m for m in list_methods() if m.name not in ("slerp", "model_stock")],
    ids=lambda m: m.name,
)
def test_unlike_updates_merge_to_about_the_size_of_one(method):
    adapters = [
        {"q": LoraFactors(draw(i, 2, SHAPE[1]), draw(50 + i, SHAPE[0], 2))} for i in range(COUNT)
    ]
    given = {}
    if "moments" in method.needs:
        given["statistics"] = [Statistics(i) for i in range(COUNT)]
    if "fisher" in method.needs:
        given["fisher"] = [{"q": draw(200 + i, *SHAPE).square()} for i in range(COUNT)]
    merged = merge_layers(adapters, method=method.name, **given)
    one = sum(float(a["q"].delta().norm()) for a in adapters) / COUNT
    assert 1 / 3 < float(merged.dense("q").norm()) / one < 3


@pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)
def test_no_weights_are_the_weights_of_the_rule(method):
    adapters = three(method)
    count = len(adapters)
    weight = {"1/√N": count**-0.5, "1/N": 1 / count, "1": 1.0}[method.weight_rule({})]
    given = needs(method, range(count))
    plain = merge_layers(adapters, method=method.name, **given)
    said = merge_layers(adapters, method=method.name, weights=weight, **given)
    assert plain.config.weights == (weight,) * count
    for layer in SHAPES:
        assert torch.equal(plain.dense(layer), said.dense(layer))


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (MergeConfig("linear", options={"normalize": True}), "1"),
        (MergeConfig("task_arithmetic"), "1/√N"),
        (MergeConfig("compose", options={"consensus": "elect"}), "1"),
        (MergeConfig("compose", options={"sparsifier": "trim"}), "1/√N"),
        (MergeConfig("core_space", options={"inner": "dare_linear"}), "1/√N"),
        (MergeConfig("core_space", options={"inner": "compose", "consensus": "energy"}), "1"),
        (MergeConfig("pico", options={"inner": "ties"}), "1/N"),
    ],
    ids=str,
)
def test_the_rule_follows_the_options(config, rule):
    assert config.weight_rule == rule


def test_single_adapters_and_layers_with_weights_of_their_own():
    one, two = adapter(1), adapter(2)
    alone = merge_layers([one])
    assert alone.config.weights == (1.0,)
    both = merge_layers([one, two], layer_weights={"^q$": [1.0, 0.0]})
    assert torch.allclose(both.dense("q"), one["q"].delta())
    half = 0.5**0.5
    assert torch.allclose(both.dense("v"), half * (one["v"].delta() + two["v"].delta()))
