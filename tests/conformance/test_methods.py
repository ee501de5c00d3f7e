"""Every registered merge method passes this suite; a new one adds a row to NEUTRAL."""

import copy

import pytest
import torch
from dense_references import (
    ref_band,
    ref_consensus,
    ref_core,
    ref_core_sce,
    ref_ctm,
    ref_dare,
    ref_elect,
    ref_emr_unified,
    ref_fisher,
    ref_iso,
    ref_iso_cts,
    ref_knots,
    ref_knots_dare,
    ref_model_stock,
    ref_osrm_aware,
    ref_pico,
    ref_regmean,
    ref_robust,
    ref_sce,
    ref_slerp,
    ref_sum,
    ref_svd,
    ref_trim,
    ref_tsv,
    ref_wudi,
    ref_wudi_published,
)
from small_merges import (
    SHAPES,
    WEIGHTS,
    adapter,
    close,
    dense,
    dense_of,
    merge,
    mixed,
    three,
)

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import list_methods

# The options at which one adapter with weight 1 gives itself; None where there are none.
NEUTRAL = {
    "linear": {},
    "svd": {},
    "ties": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "magnitude_prune": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "della": {"density": 1.0},
    "sce": {},
    "tall_masks": {},
    "consensus_ta": {},
    "emr": {},
    "slerp": None,  # needs two
    "model_stock": {},
    "tsv_m": {},
    "iso_c": None,  # flattens the spectrum of one adapter too
    "iso_cts": None,
    "knots_ties": {"density": 1.0},
    "knots_dare_ties": {"density": 1.0},
    "core_space": {"density": 1.0},
    "ctm": {},
    "pico": {},
    "lora_lego": {},
    "robust_merge": {"density": 1.0, "lambda_": 1.0},
    "wudi": {},
    "regmean": {},
    "osrm_aware": {},
    "fisher": {},
    "compose": {},
}
# Options with which a method that draws only then does draw.
DRAWS = {
    "compose": {"sparsifier": "random_drop"},
    "core_space": {"inner": "dare_linear"},
    "ctm": {"inner": "dare_linear"},
    "pico": {"inner": "dare_ties"},
}
# Where an adapter that is zero leaves the result of the others as it is. In the others it counts:
# as a task to keep at zero output (regmean, osrm_aware, fisher), as a run (model_stock), as a draw.
ZERO_CHANGES_NOTHING = {
    "linear", "svd", "ties", "magnitude_prune", "breadcrumbs", "sce",
    "tall_masks", "consensus_ta", "emr", "tsv_m", "iso_c", "iso_cts", "knots_ties",
    "knots_dare_ties", "core_space", "ctm", "pico", "lora_lego", "robust_merge", "wudi", "compose",
}  # fmt: skip

every = pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)


def test_every_method_has_a_row():
    assert set(NEUTRAL) == {method.name for method in list_methods()}


@every
def test_one_adapter_with_weight_one_gives_itself(method):
    options = NEUTRAL[method.name]
    if options is None:
        pytest.skip("not lossless")
    one = adapter(1, rank=3)
    merged = merge(method, [one], weights=1.0, **options)
    for layer, factors in one.items():
        assert close(merged.dense(layer), factors.delta())
        assert close(dense_of(merged.of(0)[layer]), factors.delta())


@every
def test_order_does_not_matter_where_symmetric(method):
    if not method.symmetric:
        pytest.skip("declared not symmetric")
    adapters = three(method)
    order = [1, 0] if len(adapters) == 2 else [2, 0, 1]
    there = merge(method, adapters)
    weights = [WEIGHTS[i] for i in order]
    back = merge(method, [adapters[i] for i in order], order, weights=weights)
    for layer in SHAPES:
        assert close(there.dense(layer), back.dense(layer))
        for was, task in enumerate(order):
            assert close(dense_of(there.of(task)[layer]), dense_of(back.of(was)[layer]))


@every
def test_the_same_seed_gives_the_same_bits(method):
    torch.manual_seed(1)
    first = merge(method, three(method), seed=5)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = merge(method, three(method), seed=5)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    for layer in SHAPES:
        assert torch.equal(first.dense(layer), second.dense(layer))


@every
def test_another_seed_differs_only_if_random(method):
    options = DRAWS.get(method.name, {})
    a, b = (merge(method, three(method), seed=seed, **options) for seed in (5, 6))
    assert torch.equal(a.dense("q"), b.dense("q")) is not method.random


@every
def test_a_layer_does_not_depend_on_the_others(method):
    adapters = three(method)
    alone = merge(method, [{"v": a["v"]} for a in adapters])
    assert torch.equal(alone.dense("v"), merge(method, adapters).dense("v"))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_kind_of_result(method, dtype):
    adapters = three(method, dtype)
    merged = merge(method, adapters)
    wide = merge(method, [{n: f.to(torch.float64) for n, f in a.items()} for a in adapters])
    for layer, update in merged.layers.items():
        assert isinstance(update, LoraFactors) is method.low_rank
        assert merged.dense(layer).dtype == dtype
        assert merged.dense(layer).shape == SHAPES[layer]
        if dtype != torch.float64:  # computed wide: only the result is rounded
            error = (merged.dense(layer).double() - wide.dense(layer)).norm()
            assert error <= 8 * torch.finfo(dtype).eps * max(wide.dense(layer).norm(), 1)


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_is_kept_and_the_draws_with_it(method):
    adapters = three(method)
    there = merge(method, [{n: f.to("cuda") for n, f in a.items()} for a in adapters])
    here = merge(method, adapters)
    for layer in SHAPES:
        assert there.dense(layer).device.type == "cuda"
        assert close(there.dense(layer).cpu(), here.dense(layer))


def written_otherwise(how):
    """Adapters whose updates are the same and whose factors are not."""

    def folded(f, number):  # the scaling a part of B
        return LoraFactors(f.A, f.scaling * f.B)

    def halved(f, number):
        return LoraFactors(f.A, 2.0**number * f.B, f.scaling / 2.0**number)

    def negative(f, number):
        return LoraFactors(f.A, -f.B, -f.scaling)

    def balanced(f, number):
        c = (0.3, 2.0, 5.0)[number]
        return LoraFactors(c * f.A, f.B / c, f.scaling)

    def mixed_rows(f, number):
        g = torch.Generator().manual_seed(number)
        M = torch.randn(f.rank, f.rank, generator=g, dtype=f.A.dtype)
        return LoraFactors(M @ f.A, f.B @ torch.linalg.inv(M), f.scaling)

    form = locals()[how]
    return lambda adapters: [
        {name: form(f, number) for name, f in a.items()} for number, a in enumerate(adapters)
    ]


def apart(one, other, task):
    return max(
        float((dense_of(one.of(task)[n]) - dense_of(other.of(task)[n])).norm()) for n in SHAPES
    )


@every
@pytest.mark.parametrize("how", ["folded", "halved", "negative", "balanced", "mixed_rows"])
def test_the_same_updates_in_other_factors_give_the_same(method, how):
    """Where the scaling stands never matters; how an update is split does where it is declared."""
    if method.by_factors and how in ("balanced", "mixed_rows"):
        pytest.skip("declared to depend on A and B themselves")
    adapters = three(method)
    for options in ({}, DRAWS.get(method.name, {})):
        was = merge(method, adapters, **options)
        now = merge(method, written_otherwise(how)(adapters), **options)
        for task in range(len(adapters)):
            assert apart(was, now, task) < 1e-9


@pytest.mark.parametrize(
    "method", [m for m in list_methods() if m.by_factors], ids=lambda m: m.name
)
def test_a_method_declared_to_depend_on_the_factors_does(method):
    adapters = three(method)
    options = {"inner": "ties"} if method.open_options else {}
    others = written_otherwise("mixed_rows")(adapters)
    was, now = (merge(method, a, **options) for a in (adapters, others))
    assert apart(was, now, 0) > 1e-3


@pytest.mark.parametrize("how", ["balanced", "mixed_rows"])
def test_the_core_space_of_an_inner_method_without_a_basis_does_not_depend_on_them(how):
    method = next(m for m in list_methods() if m.name == "core_space")
    adapters = three(method)
    for inner in ("linear", "tsv_m", "iso_c"):
        was = merge(method, adapters, inner=inner)
        now = merge(method, written_otherwise(how)(adapters), inner=inner)
        assert apart(was, now, 0) < 1e-9


@every
def test_a_missing_layer_is_a_zero_update(method):
    adapters = three(method)
    d_out, d_in = SHAPES["q"]
    for absent in range(len(adapters)):
        without, zeroed = list(adapters), list(adapters)
        without[absent] = {"v": adapters[absent]["v"]}
        zero = LoraFactors(
            torch.zeros(2, d_in, dtype=torch.float64), torch.zeros(d_out, 2, dtype=torch.float64)
        )
        zeroed[absent] = {**without[absent], "q": zero}
        for options in ({}, NEUTRAL[method.name] or {}):
            a, b = merge(method, without, **options), merge(method, zeroed, **options)
            assert close(a.dense("q"), b.dense("q"))


@every
def test_all_zero_updates_merge_to_zero(method):
    zeros = [
        {n: LoraFactors(f.A, torch.zeros_like(f.B)) for n, f in a.items()} for a in three(method)
    ]
    assert not merge(method, zeros).dense("q").any()


@every
def test_a_zero_adapter_changes_nothing_that_it_should_not(method):
    """A zero update beside others: finite, and not a part of the others' span is lost."""
    adapters = three(method)
    zero = {n: LoraFactors(f.A, torch.zeros_like(f.B)) for n, f in adapters[0].items()}
    adapters[0] = zero
    merged = merge(method, adapters)
    for layer in SHAPES:
        assert merged.dense(layer).isfinite().all()
    if method.name in ZERO_CHANGES_NOTHING:
        rest = merge(
            method, adapters[1:], range(1, len(adapters)), weights=WEIGHTS[1 : len(adapters)]
        )
        for layer in SHAPES:
            assert close(merged.dense(layer), rest.dense(layer))


@every
def test_the_same_adapter_given_twice_is_finite(method):
    one = adapter(3, dtype=torch.float32)
    merged = merge(method, [one, one], weights=1.0)
    for layer in SHAPES:
        assert merged.dense(layer).isfinite().all()
        assert merged.dense(layer).norm() < 10 * one[layer].delta().norm()


@every
def test_inputs_are_not_mutated(method):
    adapters = three(method)
    before = copy.deepcopy(adapters)
    weights = list(WEIGHTS[: len(adapters)])
    merge(method, adapters, weights=weights, rank=1)
    assert weights == WEIGHTS[: len(adapters)]
    for was, is_ in zip(before, adapters, strict=True):
        assert list(was) == list(is_)
        for layer in was:
            assert torch.equal(was[layer].A, is_[layer].A)
            assert torch.equal(was[layer].B, is_[layer].B)


@every
def test_an_unknown_option_is_an_error_that_lists_the_valid(method):
    named = method.options["inner"] if method.open_options else method.name
    with pytest.raises(MergeError, match=f"option 'nonsense' in the method '{named}'") as e:
        merge(method, three(method), nonsense=1)
    for option in next(m for m in list_methods() if m.name == named).options:
        assert option in str(e.value)


@every
def test_rank_gives_factors_of_that_rank_and_an_error(method):
    merged = merge(method, three(method), rank=2)
    for layer, update in merged.layers.items():
        assert isinstance(update, LoraFactors) and update.rank <= 2
        assert 0 <= merged.truncation_error[layer] < 1


@pytest.mark.parametrize(
    "method", [m for m in list_methods() if "space" in m.options], ids=lambda m: m.name
)
def test_the_factor_space_returns_factors_of_the_input_rank(method):
    adapters = [adapter(seed) for seed in range(3)]
    adapters[1] = {"v": adapters[1]["v"]}  # an absent layer has any rank
    merged = merge(method, adapters, space="factors")
    for update in merged.layers.values():
        assert isinstance(update, LoraFactors) and update.rank == 2


REFERENCES = {
    "linear": ({}, lambda a, n, d, w, r: ref_sum(d, w)),
    "linear lambda": ({"lambda_": 0.3}, lambda a, n, d, w, r: 0.3 * ref_sum(d, w)),
    "svd": ({}, lambda a, n, d, w, r: ref_svd(d, w, max(r))),
    "ties": (
        {"density": 0.4, "lambda_": 0.7},
        lambda a, n, d, w, r: 0.7 * ref_elect([ref_trim(x, 0.4) for x in d], w),
    ),
    "ties frequency": (
        {"density": 0.6, "majority_sign_method": "frequency"},
        lambda a, n, d, w, r: ref_elect([ref_trim(x, 0.6) for x in d], w, frequency=True),
    ),
    "dare_linear": ({"density": 0.6}, lambda a, n, d, w, r: ref_sum(ref_dare(n, d, 0.6), w)),
    "dare_ties": ({"density": 0.6}, lambda a, n, d, w, r: ref_elect(ref_dare(n, d, 0.6), w)),
    "magnitude_prune": (
        {"density": 0.3},
        lambda a, n, d, w, r: ref_sum([ref_trim(x, 0.3) for x in d], w),
    ),
    "breadcrumbs": (
        {"density": 0.5, "gamma": 0.1},
        lambda a, n, d, w, r: ref_sum([ref_band(x, 0.5, 0.1) for x in d], w),
    ),
    "sce": ({}, lambda a, n, d, w, r: ref_sce(d, w)),
    "sce select": ({"select_topk": 0.3}, lambda a, n, d, w, r: ref_sce(d, w, 0.3)),
    "slerp": ({}, lambda a, n, d, w, r: ref_slerp(d, w)),
    "model_stock": ({}, lambda a, n, d, w, r: ref_model_stock(d, w)),
    "tsv_m": ({}, lambda a, n, d, w, r: ref_tsv(d, w, r)),
    "iso_c": ({}, lambda a, n, d, w, r: ref_iso(d, w, r)),
    "tall_masks": ({}, lambda a, n, d, w, r: ref_sum(d, w)),
    "consensus_ta": (
        {"tall_lambda": 0.6},
        lambda a, n, d, w, r: ref_consensus(d, w, 0.6, 2),
    ),
    "emr": ({}, lambda a, n, d, w, r: ref_emr_unified(d, w)),
    "iso_cts": (
        {"common_space_fraction": 0.5},
        lambda a, n, d, w, r: ref_iso_cts(d, w, r, 0.5),
    ),
    "knots_dare_ties": (
        {"density": 0.6},
        lambda a, n, d, w, r: ref_knots_dare(n, d, w, r, 0.6),
    ),
    "pico": ({}, lambda a, n, d, w, r: ref_pico(a, n, d, w, ref_sum)),
    "pico ties": (
        {"inner": "ties", "density": 0.5},
        lambda a, n, d, w, r: ref_pico(
            a, n, d, w, lambda c, v: ref_elect([ref_trim(x, 0.5) for x in c], v)
        ),
    ),
    "robust_merge": ({"density": 0.5}, lambda a, n, d, w, r: ref_robust(a, n, w, 0.5)),
    "robust_merge equations": (
        {"density": 0.5, "lambda_": 2**0.5, "att_ratio": 1.0},
        lambda a, n, d, w, r: ref_robust(a, n, w, 0.5, 2**0.5, 1.0),
    ),
    "lora_lego": ({"clusters": 99}, lambda a, n, d, w, r: ref_sum(d, w)),
    "wudi": ({}, lambda a, n, d, w, r: ref_wudi(d, w, 0.3)),
    "wudi published": (
        {"steps": 40, "learning_rate": 1e-3},
        lambda a, n, d, w, r: ref_wudi_published(d, w, 40, 1e-3),
    ),
    "regmean": ({}, lambda a, n, d, w, r: ref_regmean(n, d, w, 0.9, 1e-2)),
    "osrm_aware": ({}, lambda a, n, d, w, r: ref_osrm_aware(n, d, w)),
    "osrm_aware rank": ({"rank": 2}, lambda a, n, d, w, r: ref_osrm_aware(n, d, w, 2)),
    "fisher": ({}, lambda a, n, d, w, r: ref_fisher(n, d, w)),
    "compose": (
        {"sparsifier": "trim", "density": 0.4, "consensus": "energy", "space": "core"},
        lambda a, n, d, w, r: ref_core_sce(a, n, w, 0.4),
    ),
    "knots_ties": ({"density": 0.3}, lambda a, n, d, w, r: ref_knots(d, w, r, 0.3)),
    "core_space": ({"density": 0.3}, lambda a, n, d, w, r: ref_core(a, n, w, 0.3)),
    "ctm": (
        {"inner": "ties", "density": 0.3},
        lambda a, n, d, w, r: ref_ctm(d, w, max(r), 0.25, 0.3),
    ),
    "ctm all alike": (
        {"inner": "ties", "density": 0.5, "beta": 0.0},
        lambda a, n, d, w, r: ref_ctm(d, w, max(r), 0.0, 0.5),
    ),
}


@pytest.mark.parametrize("row", REFERENCES, ids=str)
def test_agreement_with_an_independent_dense_reference(row):
    method = next(m for m in list_methods() if m.name == row.split()[0])
    options, reference = REFERENCES[row]
    adapters = three(method)
    if method.name == "model_stock":  # give the runs something in common
        adapters = [{n: mixed(a[n], adapters[0][n]) for n in a} for a in adapters]
    weights = WEIGHTS[: len(adapters)]
    merged = merge(method, adapters, **options)
    for layer in SHAPES:
        ranks = [a[layer].rank for a in adapters]
        expected = reference(adapters, layer, dense(adapters, layer), weights, ranks)
        assert expected.any()
        assert close(merged.dense(layer), expected)


def test_every_method_has_a_reference():
    drawn = {"della"}  # its draws are checked statistically in test_merge_parts
    assert {row.split()[0] for row in REFERENCES} | drawn == {m.name for m in list_methods()}
