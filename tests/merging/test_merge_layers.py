"""merge_layers: what it promises about layers, weights, options, ranks and errors."""

import dataclasses

import pytest
import torch

from orthomerge.errors import MergeError, OrthomergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import iter_merge, layer_seed, merge_layers, plan_merge


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
    (
        [ONE, TWO],
        {"method": "regmean"},
        "the method 'regmean' needs statistics: give each adapter's statistics file, in order.",
    ),
    ([ONE, TWO], {"method": "fisher"}, "the method 'fisher' needs Fisher information"),
    ([ONE, TWO], {"method": "fisher", "fisher": [{}]}, "1 of fisher for 2 adapters"),
    ([ONE], {"method": "fisher", "fisher": [{}]}, "no Fisher information for layer 'q'"),
    (
        [ONE],
        {"method": "fisher", "fisher": [{"q": torch.ones(2, 2), "v": torch.ones(6, 5)}]},
        "the Fisher information of layer 'q' is [2, 2], the update [6, 5]",
    ),
    (
        [ONE],
        {"method": "fisher", "fisher": [{"q": -torch.ones(6, 5), "v": torch.ones(6, 5)}]},
        "has values that are negative or not finite",
    ),
    ([ONE], {"layer_weights": {"k$": 1.0}}, "no layer matches 'k$': layers are named as 'q'."),
    ([ONE], {"layer_weights": {"(": 1.0}}, "'(' is not a regular expression"),
    (
        [ONE, TWO],
        {"layer_weights": {"q": [1.0]}},
        "1 weights of layers 'q' for 2 adapters: give one weight for each adapter",
    ),
    ([ONE], {"method": "tall_masks", "tall_lambda": 0}, "'tall_lambda' must be a number above 0"),
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
    with pytest.raises(MergeError, match="layer 'q' is on cpu and meta"):
        merge_layers([ONE, elsewhere])


@pytest.mark.parametrize(
    "given, same",
    [(None, [0.5**0.5, 0.5**0.5]), (0.5, [0.5, 0.5]), (2, [2, 2]), ((1, -1), [1, -1])],
)
def test_weights_are_one_number_for_all_or_one_each(given, same):
    for layer in ONE:
        ours = merge_layers([ONE, TWO], weights=given).dense(layer)
        assert torch.allclose(ours, same[0] * ONE[layer].delta() + same[1] * TWO[layer].delta())


def test_layers_are_the_union_in_the_order_first_seen():
    merged = merge_layers([{"b": factors(1)}, {"a": factors(2), "b": factors(3)}], weights=1.0)
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


WIDE = [{"q": factors(n, rank=n + 1, d_out=16, d_in=12), "v": factors(n)} for n in range(3)]


def test_the_rank_sum_cuts_dense_updates_alone_and_only_where_that_makes_them_smaller():
    whole = merge_layers(WIDE, method="ties")
    cut = merge_layers(WIDE, method="ties", rank="sum")
    assert cut.layers["q"].rank == 6 and list(cut.truncation_error) == ["q"]
    left = torch.linalg.svdvals(whole.dense("q"))[6:]
    least = left.norm() / whole.dense("q").norm()
    assert cut.truncation_error["q"] == pytest.approx(float(least), rel=1e-6)
    assert torch.equal(cut.dense("v"), whole.dense("v"))  # 9 is more than its width
    for method in ("linear", "svd", "core_space"):
        sums = merge_layers(WIDE, method=method, rank="sum")
        full = merge_layers(WIDE, method=method, rank="full")
        assert all(torch.equal(sums.dense(n), full.dense(n)) for n in WIDE[0])
    own = merge_layers(WIDE, method="emr", rank="sum")
    assert all(task["q"].rank == 6 for task in own.tasks)


def test_no_rank_no_truncation_error():
    assert merge_layers(WIDE, method="ties", rank="full").truncation_error == {}
    assert merge_layers([ONE, TWO], method="ties").truncation_error == {}


def test_svd_keeps_the_largest_input_rank_unless_told():
    assert merge_layers([ONE, TWO], method="svd").layers["v"].rank == 3


def test_the_keys_lambda_and_lambda__are_one_option():
    spelled = merge_layers([ONE, TWO], method="task_arithmetic", weights=1.0, **{"lambda": 0.3})
    ours = merge_layers([ONE, TWO], method="task_arithmetic", lambda_=0.3, weights=1.0)
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


def test_weights_by_layer_take_the_first_expression_that_matches():
    merged = merge_layers(
        [ONE, TWO], weights=[1.0, 1.0], layer_weights={"^q$": [0.5, -2.0], "q|v": [3.0, 0.0]}
    )
    q = 0.5 * ONE["q"].delta() - 2.0 * TWO["q"].delta()
    torch.testing.assert_close(merged.dense("q"), q)
    torch.testing.assert_close(merged.dense("v"), 3.0 * ONE["v"].delta())


@pytest.mark.parametrize("method", ["ties", "dare_ties", "svd", "emr"])
@pytest.mark.parametrize("how", [{"workers": 3}, {"devices": ["cpu", "cpu"]}])
def test_layers_side_by_side_give_what_one_after_the_other_gives(method, how):
    many = [{f"layer{i}": factors(10 * a + i) for i in range(9)} for a in range(3)]
    alone, beside = (merge_layers(many, method=method, **h) for h in ({}, how))
    assert list(alone.layers) == list(beside.layers)
    for layer in alone.layers:
        torch.testing.assert_close(alone.dense(layer), beside.dense(layer))


def test_an_error_in_one_layer_ends_a_merge_side_by_side_and_restores_the_threads():
    before = torch.get_num_threads()
    many = {f"layer{i}": factors(i) for i in range(9)} | {"wrong": bad(float("nan"))}
    with pytest.raises(MergeError, match="layer 'wrong' has values that are not finite"):
        merge_layers([many, {"wrong": bad(1.0)}], workers=2)
    assert torch.get_num_threads() == before


class Lazy(dict):
    """Counts how often a layer is read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read: list[str] = []

    def __getitem__(self, key):
        self.read.append(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        if key not in self:
            return default
        return self[key]


def test_layers_stream_and_a_lazy_adapter_is_read_once_a_layer():
    lazy = [Lazy(ONE), Lazy(TWO)]
    seen = []
    stream = iter_merge(lazy, progress=lambda done, total: seen.append((done, total)))
    assert not lazy[0].read
    first = next(stream)
    assert first.name == "q" and lazy[0].read == ["q"] == lazy[1].read
    assert [layer.name for layer in stream] == ["v"]
    assert lazy[0].read == ["q", "v"] and seen == [(1, 2), (2, 2)]


def test_a_plan_gives_layers_in_any_order_and_is_refused_at_once():
    plan = plan_merge([ONE, TWO], method="ties", density=0.5)
    whole = merge_layers([ONE, TWO], method="ties", density=0.5)
    for name in reversed(plan.names):
        torch.testing.assert_close(plan.merge(name).update, whole.dense(name))
    with pytest.raises(OrthomergeError, match="unknown option"):
        plan_merge([ONE], nonsense=1)


def test_an_adapter_finds_its_own_update_where_the_method_leaves_one():
    shared, own = merge_layers([ONE, TWO]), merge_layers([ONE, TWO], method="emr", rank=2)
    assert shared.of(1) is shared.layers
    assert own.of(0) is own.tasks[0] and own.of(0) is not own.layers
    assert all(isinstance(u, LoraFactors) and u.rank == 2 for u in own.of(1).values())


@pytest.mark.parametrize(
    ("width", "said", "used"), [(32, None, 1), (2048, None, 2), (32, "2", 2)], ids=str
)
def test_a_small_layer_takes_one_thread_unless_the_user_says_how_many(
    width, said, used, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    adapter = {"layer": LoraFactors(torch.ones(1, width), torch.ones(width, 1))}
    plan = plan_merge([adapter, adapter])
    seen, own = [], plan._parted
    monkeypatch.setattr(plan, "_parted", lambda *a: seen.append(torch.get_num_threads()) or own(*a))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plan.merge("layer")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [used]


def test_ctm_refuses_a_density_that_would_leave_nothing_of_so_few_coordinates():
    with pytest.raises(MergeError, match="'ties' keeps none of 9 coordinates"):
        merge_layers([ONE, TWO], method="ctm", inner="ties", density=0.05)
    small = merge_layers([ONE, TWO], method="ctm", inner="ties", density=0.5, rank=2)
    assert {f.rank for f in small.layers.values()} == {2}
    assert all(0 < error < 1 for error in small.truncation_error.values())
