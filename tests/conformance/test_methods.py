"""Every registered merge method passes this suite; a new one adds a row to NEUTRAL."""

import copy

import pytest
import torch

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import MergeMethod, layer_seed, list_methods, merge_layers

# The options at which one adapter with weight 1 gives itself; None where there are none.
NEUTRAL = {
    "linear": {},
    "cat": {},
    "task_arithmetic": {},
    "svd": {},
    "ties": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "magnitude_prune": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "della": {"density": 1.0},
    "sce": {},
    "slerp": None,  # needs two
    "model_stock": {},
    "tsv_m": {},
    "iso_c": None,  # flattens the spectrum of one adapter too
    "knots_ties": {"density": 1.0},
    "core_space": {"density": 1.0},
}
WEIGHTS = [0.7, 1.3, 0.4]
SHAPES = {"q": (9, 7), "v": (6, 8)}

every = pytest.mark.parametrize("method", list_methods(), ids=lambda m: m.name)


def adapter(seed: int, rank: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, LoraFactors]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            torch.randn(rank, d_in, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(d_out, rank, generator=g, dtype=torch.float64).to(dtype),
            0.5 + seed,
        )
        for name, (d_out, d_in) in SHAPES.items()
    }


def three(method: MergeMethod, dtype: torch.dtype = torch.float64) -> list[dict[str, LoraFactors]]:
    """Three adapters (two for slerp) of different ranks, not so small that nothing overlaps."""
    ranks = (2, 3, 2)[: 2 if method.name == "slerp" else 3]
    return [adapter(seed, rank, dtype) for seed, rank in enumerate(ranks)]


def merge(method: MergeMethod, adapters, **arguments):
    arguments.setdefault("weights", WEIGHTS[: len(adapters)])
    return merge_layers(adapters, method=method.name, **arguments)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-9) -> bool:
    return torch.allclose(a.double(), b.double(), atol=atol, rtol=atol)


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


@every
def test_order_does_not_matter_where_symmetric(method):
    if not method.symmetric:
        pytest.skip("declared not symmetric")
    adapters = three(method)
    order = [1, 0] if len(adapters) == 2 else [2, 0, 1]
    there = merge(method, adapters)
    back = merge(method, [adapters[i] for i in order], weights=[WEIGHTS[i] for i in order])
    for layer in SHAPES:
        assert close(there.dense(layer), back.dense(layer))


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
    a, b = (merge(method, three(method), seed=seed) for seed in (5, 6))
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
        {"q": LoraFactors(torch.randn(2, 5), torch.zeros(4, 2))} for _ in range(len(three(method)))
    ]
    assert not merge(method, zeros).dense("q").any()


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
    with pytest.raises(MergeError, match=f"option 'nonsense' in the method '{method.name}'") as e:
        merge(method, three(method), nonsense=1)
    for option in method.options:
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


# ---------------------------------------------------------------------------------------------
# Independent references: dense, float64, written from the papers without the library's parts.


def dense(adapters, layer):
    return [a[layer].scaling * a[layer].B.double() @ a[layer].A.double() for a in adapters]


def ref_trim(delta, density):
    order = sorted(range(delta.numel()), key=lambda i: -abs(float(delta.flatten()[i])))
    out = torch.zeros(delta.numel(), dtype=torch.float64)
    for i in order[: int(density * delta.numel())]:
        out[i] = delta.flatten()[i]
    return out.view_as(delta)


def ref_elect(deltas, weights, frequency=False):
    out = torch.zeros_like(deltas[0])
    for place in range(out.numel()):
        values = [float(d.flatten()[place]) for d in deltas]
        votes = [(v > 0) - (v < 0) for v in values] if frequency else values
        positive = sum(votes) >= 0
        kept = [(v, w) for v, w in zip(values, weights, strict=True) if v and (v > 0) == positive]
        if kept:
            out.view(-1)[place] = sum(v * w for v, w in kept) / len(kept)
    return out


def ref_sum(deltas, weights):
    return sum(w * d for d, w in zip(deltas, weights, strict=True))


def ref_masks(layer, deltas, density):
    g = torch.Generator().manual_seed(layer_seed(0, layer))
    return [torch.bernoulli(torch.full(d.shape, density), generator=g).double() for d in deltas]


def ref_dare(layer, deltas, density):
    masks = ref_masks(layer, deltas, density)
    return [d * m / density for d, m in zip(deltas, masks, strict=True)]


def ref_band(delta, density, gamma):
    n = delta.numel()
    order = sorted(range(n), key=lambda i: -abs(float(delta.flatten()[i])))
    out = torch.zeros(n, dtype=torch.float64)
    for i in order[int(gamma * n) : int(gamma * n) + int(density * n)]:
        out[i] = delta.flatten()[i]
    return out.view_as(delta)


def ref_svd(deltas, weights, rank):
    U, s, Vh = torch.linalg.svd(ref_sum(deltas, weights))
    return U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]


def ref_sce(deltas, weights, topk=1.0):
    stack = torch.stack([w * d for d, w in zip(deltas, weights, strict=True)])
    if topk < 1:
        variance = ((stack - stack.mean(0)) ** 2).mean(0).flatten()
        kept = variance.argsort(descending=True)[: int(topk * len(variance))]
        mask = torch.zeros_like(variance)
        mask[kept] = 1
        stack = stack * mask.view_as(stack[0])
    eta = [float((d**2).mean()) for d in stack]
    out = torch.zeros_like(deltas[0])
    for place in range(out.numel()):
        values = [float(d.flatten()[place]) for d in stack]
        positive = sum(values) >= 0
        kept = [(v, e) for v, e in zip(values, eta, strict=True) if v and (v > 0) == positive]
        if kept:
            out.view(-1)[place] = sum(v * e for v, e in kept) / sum(e for _, e in kept)
    return out


def ref_slerp(deltas, weights):
    a, b = deltas
    t = weights[1] / sum(weights)
    angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def ref_model_stock(deltas, weights):
    n = len(deltas)
    pairs = [
        float((deltas[i] * deltas[j]).sum() / deltas[i].norm() / deltas[j].norm())
        for i in range(n)
        for j in range(i + 1, n)
    ]
    cosine = max(sum(pairs) / len(pairs), 0)
    return n * cosine / (1 + (n - 1) * cosine) * ref_sum(deltas, weights) / sum(weights)


def ref_tsv(deltas, weights, ranks):
    share = min(deltas[0].shape) // len(deltas)
    us, ss, vs = [], [], []
    for d, w, r in zip(deltas, weights, ranks, strict=True):
        U, s, Vh = torch.linalg.svd(d)
        k = min(r, share)
        us.append(U[:, :k])
        ss.append(w * s[:k])
        vs.append(Vh[:k].T)

    def whiten(X):
        values, vectors = torch.linalg.eigh(X.T @ X)
        return X @ vectors @ torch.diag(values**-0.5) @ vectors.T

    return whiten(torch.cat(us, 1)) @ torch.diag(torch.cat(ss)) @ whiten(torch.cat(vs, 1)).T


def ref_iso(deltas, weights, ranks):
    U, s, Vh = torch.linalg.svd(ref_sum(deltas, weights))
    k = min(sum(ranks), len(s))
    return s[:k].mean() * U[:, :k] @ Vh[:k]


def ref_knots(deltas, weights, ranks, density):
    U, s, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    k = min(sum(ranks), len(s))
    blocks = (torch.diag(s[:k]) @ Vh[:k]).split(deltas[0].shape[1], dim=1)
    return U[:, :k] @ ref_elect([ref_trim(b, density) for b in blocks], weights)


def ref_core(adapters, layer, weights, density):
    U, _, _ = torch.linalg.svd(torch.cat([a[layer].B for a in adapters], 1), full_matrices=False)
    _, _, Vh = torch.linalg.svd(torch.cat([a[layer].A for a in adapters], 0), full_matrices=False)
    core = [U.T @ d @ Vh.T for d in dense(adapters, layer)]
    return U @ ref_elect([ref_trim(m, density) for m in core], weights) @ Vh


REFERENCES = {
    "linear": ({}, lambda a, n, d, w, r: ref_sum(d, w)),
    "cat": ({}, lambda a, n, d, w, r: ref_sum(d, w)),
    "task_arithmetic": ({"lambda_": 0.3}, lambda a, n, d, w, r: 0.3 * ref_sum(d, w)),
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
    "knots_ties": ({"density": 0.3}, lambda a, n, d, w, r: ref_knots(d, w, r, 0.3)),
    "core_space": ({"density": 0.3}, lambda a, n, d, w, r: ref_core(a, n, w, 0.3)),
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


def mixed(a: LoraFactors, b: LoraFactors) -> LoraFactors:
    return LoraFactors(
        torch.cat([a.A, b.A]), torch.cat([a.scaling * a.B, 2 * b.scaling * b.B], dim=1)
    )


def test_tsv_m_sums_orthogonal_adapters_exactly():
    g = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(12, 6, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(10, 6, generator=g, dtype=torch.float64))
    pair = [{"q": LoraFactors(V.T[i : i + 3], U[:, i : i + 3] * 2)} for i in (0, 3)]
    exact, ours = (merge_layers(pair, method=name).dense("q") for name in ("linear", "tsv_m"))
    assert close(exact, ours)


def test_slerp_of_an_adapter_with_itself_is_itself_and_keeps_length():
    one, two = adapter(1), adapter(2)
    assert close(merge_layers([one, one], method="slerp").dense("q"), one["q"].delta())
    unit = [
        {"q": LoraFactors(a["q"].A, a["q"].B / float((a["q"].B @ a["q"].A).norm()))}
        for a in (one, two)
    ]
    for share in (0.1, 0.5, 0.8):
        merged = merge_layers(unit, method="slerp", weights=[1 - share, share])
        assert float(merged.dense("q").norm()) == pytest.approx(1)
