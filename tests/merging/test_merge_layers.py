"""merge_layers: what it promises about layers, weights, options, ranks and errors."""

import dataclasses

import pytest
import torch

from orthomerge.errors import MergeError, OrthomergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import layer_seed, merge_layers


def factors(seed: int, rank: int = 3, d_out: int = 6, d_in: int = 5, scaling: float = 0.5):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=g, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    return LoraFactors(A, B, scaling)


ONE, TWO = {"q": factors(1), "v": factors(2)}, {"q": factors(3), "v": factors(4, rank=2)}


def bad(value: float) -> LoraFactors:
    A = torch.ones(1, 5)
    A[0, 0] = value
    return LoraFactors(A, torch.ones(6, 1))


ERRORS = [
    ([], {}, "there is nothing to merge: give at least one adapter with a layer."),
    ([{}, {}], {}, "there is nothing to merge"),
    ([ONE, TWO], {"weights": [1.0]}, "1 weights for 2 adapters: give one weight for each adapter"),
    ([ONE, TWO], {"weights": [1.0, float("nan")]}, "the weight of adapter 2 is nan"),
    ([ONE, TWO], {"weights": float("inf")}, "the weight of adapter 1 is inf"),
    (
        [ONE, {"q": factors(1, d_in=7)}],
        {},
        "layer 'q' is [6, 5] in one adapter and [6, 7] in another: merge adapters of the same",
    ),
    ([{"q": bad(float("nan"))}], {}, "layer 'q' has values that are not finite"),
    ([{"q": bad(float("inf"))}], {}, "layer 'q' has values that are not finite"),
    ([{"q": factors(1, scaling=float("nan"))}], {}, "layer 'q' has values that are not finite"),
    ([ONE], {"method": "tie"}, "unknown merging method 'tie': did you mean 'ties'? valid: linear"),
    (
        [ONE],
        {"method": "ties", "densty": 0.1},
        "unknown option 'densty' in the method 'ties': did you mean 'density'? valid: density, ",
    ),
    ([ONE], {"generator": None}, "unknown option 'generator' in the method 'linear'"),
    ([ONE], {"method": "ties", "density": 0}, "option 'density' must be a number in (0, 1], not 0"),
    ([ONE], {"method": "ties", "density": 1.5}, "option 'density' must be a number in (0, 1]"),
    ([ONE], {"method": "ties", "density": "0.2"}, "in (0, 1], not '0.2'."),
    ([ONE], {"method": "dare_ties", "density": float("nan")}, "option 'density' must be"),
    (
        [ONE],
        {"method": "ties", "majority_sign_method": "sum"},
        "option 'majority_sign_method' must be one of 'total', 'frequency', not 'sum'.",
    ),
    ([ONE], {"method": "ties", "space": "both"}, "option 'space' must be one of 'delta',"),
    ([ONE], {"method": "ties", "lambda": float("inf")}, "option 'lambda_' must be a finite number"),
    ([ONE], {"method": "ties", "lambda": 1, "lambda_": 1}, "'lambda' and 'lambda_' are the same"),
    ([ONE], {"normalize": 1}, "option 'normalize' must be true or false, not 1."),
    ([ONE, TWO], {"normalize": True, "weights": [1, -1]}, "weights that do not sum to zero"),
    ([ONE], {"rank": 0}, "option 'rank' must be a whole number of at least 1, not 0."),
    ([ONE], {"method": "svd", "rank": 1.5}, "option 'rank' must be a whole number"),
    (
        [ONE, TWO],
        {"method": "ties", "space": "factors"},
        "layer 'v': space 'factors' needs equal ranks, not 2, 3: use space 'delta'.",
    ),
    ([ONE], {"method": "slerp"}, "slerp merges exactly two adapters, not 1"),
    ([ONE, TWO], {"method": "slerp", "weights": [1, -1]}, "weights that are not negative"),
    ([ONE, TWO], {"method": "model_stock", "weights": [1, -1]}, "that do not sum to zero"),
    (
        [ONE],
        {"method": "breadcrumbs", "density": 0.9, "gamma": 0.2},
        "options 'density' and 'gamma' must sum to at most 1, not 0.9 + 0.2.",
    ),
    ([ONE], {"method": "della", "density": 0.9, "epsilon": 0.4}, "option 'epsilon' must keep"),
]


@pytest.mark.parametrize("adapters, arguments, message", ERRORS, ids=[e[2][:50] for e in ERRORS])
def test_a_merge_that_is_not_defined_says_why(adapters, arguments, message):
    with pytest.raises(OrthomergeError) as caught:
        merge_layers(adapters, **arguments)
    assert message in str(caught.value)


def test_devices_that_differ_are_an_error():
    elsewhere = {"q": factors(1).to("meta")}
    with pytest.raises(MergeError, match="layer 'q' lies on cpu and meta"):
        merge_layers([ONE, elsewhere])


@pytest.mark.parametrize(
    "given, same", [(None, [1.0, 1.0]), (0.5, [0.5, 0.5]), (2, [2, 2]), ((1, -1), [1, -1])]
)
def test_weights_are_one_number_for_all_or_one_each(given, same):
    for layer in ONE:
        ours = merge_layers([ONE, TWO], weights=given).dense(layer)
        assert torch.allclose(ours, same[0] * ONE[layer].delta() + same[1] * TWO[layer].delta())


def test_layers_are_the_union_in_the_order_first_seen():
    merged = merge_layers([{"b": factors(1)}, {"a": factors(2), "b": factors(3)}])
    assert list(merged.layers) == ["b", "a"]
    assert torch.allclose(merged.dense("a"), factors(2).delta())


def test_rank_truncates_to_the_best_approximation_and_records_the_error():
    for method in ("linear", "svd", "ties"):
        whole = merge_layers([ONE, TWO], method="linear" if method == "svd" else method)
        merged = merge_layers([ONE, TWO], method=method, rank=2)
        for layer in ONE:
            exact = whole.dense(layer)
            s = torch.linalg.svdvals(exact)
            assert merged.layers[layer].rank == 2
            assert merged.truncation_error[layer] == pytest.approx(float(s[2:].norm() / s.norm()))
            assert float((exact - merged.dense(layer)).norm()) == pytest.approx(float(s[2:].norm()))


def test_a_rank_that_is_large_enough_changes_nothing():
    merged = merge_layers([ONE, TWO], rank=64)
    assert merged.truncation_error == {"q": 0.0, "v": 0.0}
    assert torch.equal(merged.dense("q"), merge_layers([ONE, TWO]).dense("q"))


def test_no_rank_no_truncation_error():
    assert merge_layers([ONE, TWO], method="ties").truncation_error == {}


def test_svd_keeps_the_largest_input_rank_unless_told():
    assert merge_layers([ONE, TWO], method="svd").layers["v"].rank == 3


def test_the_keys_lambda_and_lambda__are_one_option():
    spelled = merge_layers([ONE, TWO], method="task_arithmetic", **{"lambda": 0.3})
    ours = merge_layers([ONE, TWO], method="task_arithmetic", lambda_=0.3)
    assert torch.equal(spelled.dense("q"), ours.dense("q"))
    assert torch.allclose(ours.dense("q"), 0.3 * (ONE["q"].delta() + TWO["q"].delta()))


def test_normalize_divides_by_the_sum_of_weights():
    merged = merge_layers([ONE, TWO], weights=[1, 3], normalize=True)
    assert torch.allclose(
        merged.dense("q"), 0.25 * ONE["q"].delta() + 0.75 * TWO["q"].delta(), atol=1e-12
    )


def test_a_merged_update_is_frozen_and_names_the_nearest_layer():
    merged = merge_layers([{"query": factors(1)}])
    with pytest.raises(dataclasses.FrozenInstanceError):
        merged.method = "other"
    with pytest.raises(MergeError, match="did you mean 'query'"):
        merged.dense("quary")


def test_the_seed_of_a_layer_is_stable():
    # A change here changes every seeded merge ever made: it must be announced.
    assert layer_seed(0, "q") == 716247880513399942
    assert len({layer_seed(s, n) for s in (0, 1) for n in ("q", "v")}) == 4


def test_mixed_dtypes_promote():
    merged = merge_layers(
        [{"q": factors(1).to(torch.bfloat16)}, {"q": factors(2).to(torch.float32)}]
    )
    assert merged.dense("q").dtype == torch.float32
