"""MergeConfig: checked when it is made, and one meaning for all that merges."""

import dataclasses
import json

import pytest
import torch
from test_merge_layers import ONE, TWO

from orthomerge.errors import OrthomergeError
from orthomerge.merging import MergeConfig, iter_merge, merge_layers, plan_merge

WRONG = [
    ({"method": "tise"}, "did you mean 'ties'"),
    ({"weights": [1.0, float("nan")]}, "the weight of adapter 2 is nan: it must be finite."),
    ({"layer_weights": {"q": float("inf")}}, "the weight of layers 'q' of adapter 1 is inf"),
    ({"layer_weights": {"(": 1.0}}, "'(' is not a regular expression"),
    ({"rank": 0}, "option 'rank' must be a whole number of at least 1, not 0."),
    ({"rank": "half"}, "the rank 'half' is none: give a whole number, 'sum'"),
    ({"heads": "drop"}, "unknown treatment of heads 'drop'"),
    ({"options": {"density": 0.5}}, "unknown option 'density' in the method 'linear'"),
    ({"method": "ties", "options": {"seed": 3}}, "'seed' is no option of the method 'ties'"),
    ({"method": "svd", "rank": 2, "options": {"rank": 3}}, "the rank of 'svd' is given twice"),
    (
        {"method": "core_space", "options": {"inner": "ties", "densty": 1}},
        "unknown option 'densty' in the method 'ties': did you mean 'density'",
    ),
    (
        {"method": "core_space", "options": {"inner": "regmean"}},
        "option 'inner' of core_space cannot be 'regmean'",
    ),
    ({"method": "pico", "options": {"inner": "tise"}}, "did you mean 'ties'"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=[m[:40] for _, m in WRONG])
def test_what_cannot_be_merged_is_refused_when_it_is_asked_for(fields, message):
    with pytest.raises(OrthomergeError) as caught:
        MergeConfig(**fields)
    assert message in str(caught.value)


FULL = MergeConfig(
    "core_space",
    [1, 0.5],
    {"q$": 0.3, "v": [2, 1]},
    rank=2,
    seed=7,
    options={"inner": "dare_ties", "density": 0.5, "lambda": 0.9},
    heads="average",
    base="org/base",
)


def test_a_configuration_is_frozen_and_goes_through_json():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.seed = 1  # type: ignore[misc]
    assert MergeConfig.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL
    assert MergeConfig.from_dict({}) == MergeConfig()
    with pytest.raises(OrthomergeError, match="did you mean 'weights'"):
        MergeConfig.from_dict({"weigths": 1})


def test_arguments_make_a_configuration_or_change_one():
    asked = MergeConfig.of(method="ties", weights=0.5, rank=None, density=0.3)
    assert asked == MergeConfig("ties", 0.5, options={"density": 0.3})
    changed = MergeConfig.of(asked, seed=3, **{"lambda": 2.0})
    assert changed == MergeConfig("ties", 0.5, seed=3, options={"density": 0.3, "lambda": 2.0})
    assert MergeConfig.of(asked, method="linear").options == {}


def test_a_configuration_merges_as_its_arguments_do():
    by_name = merge_layers(
        [ONE, TWO],
        method="core_space",
        weights=[1, 0.5],
        layer_weights=FULL.layer_weights,
        rank=2,
        seed=7,
        **FULL.options,
    )
    by_config = merge_layers([ONE, TWO], FULL)
    (first, *_), plan = list(iter_merge([ONE, TWO], FULL)), plan_merge([ONE, TWO], FULL)
    for layer in ONE:
        assert torch.equal(by_name.dense(layer), by_config.dense(layer))
        assert torch.equal(plan.merge(layer).update.delta(), by_config.dense(layer))
    assert torch.equal(first.update.delta(), by_config.dense(first.name))


def test_the_rank_of_an_inner_method_is_an_option_of_its_own():
    inner = merge_layers([ONE, TWO], MergeConfig("core_space", options={"inner": "svd", "rank": 1}))
    plain = merge_layers([ONE, TWO], method="svd", rank=1)
    for layer in ONE:
        assert torch.allclose(inner.dense(layer), plain.dense(layer), atol=1e-10)
