"""Every registered merge method passes this suite; a new one adds a row to NEUTRAL."""

import copy

import pytest
import torch

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import MergeMethod, layer_seed, list_methods, merge_layers
from orthomerge.moments import RowMoment, SecondMoment

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
    "tall_masks": {},
    "consensus_ta": {},
    "emr": {},
    "slerp": None,  # needs two
    "model_stock": {},
    "tsv_m": {},
    "iso_c": None,  # flattens the spectrum of one adapter too
    "iso_cts": None,
    "knots_ta": {},
    "knots_ties": {"density": 1.0},
    "knots_dare_ties": {"density": 1.0},
    "core_space": {"density": 1.0},
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
    "pico": {"inner": "dare_ties"},
}
# Where an adapter that is zero leaves the result of the others as it is. In the others it counts:
# as a task to keep at zero output (regmean, osrm_aware, fisher), as a run (model_stock), as a draw.
ZERO_CHANGES_NOTHING = {
    "linear", "cat", "task_arithmetic", "svd", "ties", "magnitude_prune", "breadcrumbs", "sce",
    "tall_masks", "consensus_ta", "emr", "tsv_m", "iso_c", "iso_cts", "knots_ta", "knots_ties",
    "knots_dare_ties", "core_space", "pico", "lora_lego", "robust_merge", "wudi", "compose",
}  # fmt: skip
# Methods that work on A and B apart need equal ranks.
EQUAL_RANKS = {"robust_merge"}
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
    ranks = (2, 2, 2) if method.name in EQUAL_RANKS else (2, 3, 2)
    ranks = ranks[: 2 if method.name == "slerp" else 3]
    return [adapter(seed, rank, dtype) for seed, rank in enumerate(ranks)]


class Statistics:
    """The statistics of one task: a moment of some rows for every layer."""

    def __init__(self, number: int) -> None:
        self.number = number

    def rows(self, layer: str) -> torch.Tensor:
        g = torch.Generator().manual_seed(100 + self.number)
        d_in = SHAPES.get(layer, (4, 5))[1]
        return torch.randn(40, d_in, generator=g, dtype=torch.float64) @ torch.diag(
            torch.linspace(0.2, 1 + self.number, d_in, dtype=torch.float64)
        )

    def moment(self, layer: str) -> SecondMoment:
        return SecondMoment(self.rows(layer).shape[1]).update(self.rows(layer))


def information(number: int, shapes=None) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(200 + number)
    return {
        name: torch.rand(*shape, generator=g, dtype=torch.float64) ** 2 * (number + 1)
        for name, shape in (shapes or {**SHAPES}).items()
    }


def needs(method: MergeMethod, numbers) -> dict:
    """What the method must be given beside the adapters, by their numbers: they may be permuted."""
    given = {}
    if "moments" in method.needs:
        given["statistics"] = [Statistics(number) for number in numbers]
    if "fisher" in method.needs:
        given["fisher"] = [information(number) for number in numbers]
    return given


def merge(method: MergeMethod, adapters, numbers=None, **arguments):
    arguments.setdefault("weights", WEIGHTS[: len(adapters)])
    given = needs(method, numbers or range(len(adapters)))
    return merge_layers(adapters, method=method.name, **{**given, **arguments})


def dense_of(update):
    return update.delta() if isinstance(update, LoraFactors) else update


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


def ref_core_sce(adapters, layer, weights, density):
    U, _, _ = torch.linalg.svd(torch.cat([a[layer].B for a in adapters], 1), full_matrices=False)
    _, _, Vh = torch.linalg.svd(torch.cat([a[layer].A for a in adapters], 0), full_matrices=False)
    core = [ref_trim(U.T @ d @ Vh.T, density) for d in dense(adapters, layer)]
    return U @ ref_sce(core, weights) @ Vh


def ref_tall(deltas, weights, tall_lambda):
    updates = [w * d for d, w in zip(deltas, weights, strict=True)]
    total = sum(updates)
    return total, [(u.abs() >= tall_lambda * (total - u).abs()).double() for u in updates]


def ref_consensus(deltas, weights, tall_lambda, agree):
    total, masks = ref_tall(deltas, weights, tall_lambda)
    return (sum(masks) >= agree).double() * total


def ref_emr_unified(deltas, weights):
    out = torch.zeros_like(deltas[0])
    for place in range(out.numel()):
        values = [w * float(d.flatten()[place]) for d, w in zip(deltas, weights, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        out.view(-1)[place] = sign * max([abs(v) for v in values if v * sign > 0], default=0.0)
    return out


def ref_iso_cts(deltas, weights, ranks, fraction):
    updates = [w * d for d, w in zip(deltas, weights, strict=True)]
    U, s, Vh = torch.linalg.svd(sum(updates), full_matrices=False)
    K = min(sum(ranks), len(s))
    each = round((K - int(K * fraction)) / len(updates))
    k = K - each * len(updates)
    us, ss, vs = [U[:, :k]], [s[:k]], [Vh[:k].T]
    for update in updates:
        rest = update - U[:, :k] @ U[:, :k].T @ update
        u, t, vh = torch.linalg.svd(rest, full_matrices=False)
        us.append(u[:, :each])
        ss.append(t[:each])
        vs.append(vh[:each].T)

    def orthonormal(X):
        P, _, Qh = torch.linalg.svd(X, full_matrices=False)
        return P @ Qh

    return torch.cat(ss).mean() * orthonormal(torch.cat(us, 1)) @ orthonormal(torch.cat(vs, 1)).T


def ref_knots_dare(layer, deltas, weights, ranks, density):
    U, s, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    k = min(sum(ranks), len(s))
    blocks = (torch.diag(s[:k]) @ Vh[:k]).split(deltas[0].shape[1], dim=1)
    return U[:, :k] @ ref_elect(ref_dare(layer, list(blocks), density), weights)


def ref_pico(adapters, layer, deltas, weights, merge_calibrated):
    B = torch.cat([a[layer].scaling * a[layer].B.double() for a in adapters], 1)
    U, s, _ = torch.linalg.svd(B)
    energy = torch.zeros(len(U), dtype=torch.float64)
    energy[: len(s)] = s**2
    C = U @ torch.diag(1 / (1 + (len(deltas) - 1) * energy / energy.sum())) @ U.T
    merged = merge_calibrated([C @ d for d in deltas], weights)
    wanted = sum(w * float(d.norm()) for d, w in zip(deltas, weights, strict=True))
    return wanted / merged.norm() * merged


def ref_robust(adapters, layer, weights, density):
    A = [a[layer].A.double() for a in adapters]
    B = [a[layer].B.double() for a in adapters]
    kept = [ref_trim(a, density) for a in A]
    S = [a.abs().sum(1) / k.abs().sum(1) for a, k in zip(A, kept, strict=True)]
    S = [torch.where(s.isfinite(), s, 0.0) for s in S]
    total = torch.where(sum(S) > 0, sum(S), 1.0)
    left = sum(
        w * a[layer].scaling * ref_trim(b, density) @ torch.diag(s / total)
        for a, b, s, w in zip(adapters, B, S, weights, strict=True)
    )
    return 2.0 * left @ sum(kept)


def ref_gram(layer, number, alpha, ridge):
    rows = Statistics(number).rows(layer)
    S = rows.T @ rows / len(rows)
    off = alpha * S + (1 - alpha) * torch.diag(S.diagonal())
    return off + ridge * S.diagonal().mean() * torch.eye(len(S), dtype=torch.float64)


def ref_regmean(layer, deltas, weights, alpha, ridge, shares=None):
    grams = [ref_gram(layer, i, alpha, ridge) for i in range(len(deltas))]
    shares = shares or [1.0] * len(deltas)
    top = sum(c * w * d @ G for c, d, w, G in zip(shares, deltas, weights, grams, strict=True))
    return top @ torch.linalg.inv(sum(c * G for c, G in zip(shares, grams, strict=True)))


def ref_osrm_aware(layer, deltas, weights, rank=None):
    shares = [
        1 / float((Statistics(i).rows(layer) @ d.T).square().sum(1).mean())
        for i, d in enumerate(deltas)
    ]
    best = ref_regmean(layer, deltas, weights, 1.0, 1e-3, shares)
    if rank is None:
        return best
    grams = [ref_gram(layer, i, 1.0, 1e-3) for i in range(len(deltas))]
    L = torch.linalg.cholesky(sum(c * G for c, G in zip(shares, grams, strict=True)))
    U, s, Vh = torch.linalg.svd(best @ L, full_matrices=False)
    return U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank] @ torch.linalg.inv(L)


def ref_fisher(layer, deltas, weights):
    F = [information(i)[layer] for i in range(len(deltas))]
    F = [f / f.mean() + 1e-6 for f in F]
    return sum(f * w * d for f, d, w in zip(F, deltas, weights, strict=True)) / sum(F)


def ref_wudi(deltas, weights, ridge):
    """Gradient descent to the minimum of the loss, by the normal equations of every output row."""
    updates = [w * d for d, w in zip(deltas, weights, strict=True)]
    grams = [u.T @ u / u.square().sum() for u in updates]
    span = torch.linalg.matrix_rank(torch.cat(updates))
    rho = ridge * float(sum(grams).diagonal().sum()) / int(span)
    eye = torch.eye(len(grams[0]), dtype=torch.float64)
    top = sum(u @ G for u, G in zip(updates, grams, strict=True)) + rho * sum(updates)
    return torch.linalg.solve(sum(grams) + rho * eye, top.T).T


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
    "knots_ta": ({}, lambda a, n, d, w, r: ref_sum(d, w)),
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
    "lora_lego": ({"clusters": 99}, lambda a, n, d, w, r: ref_sum(d, w)),
    "wudi": ({}, lambda a, n, d, w, r: ref_wudi(d, w, 1e-2)),
    "regmean": ({}, lambda a, n, d, w, r: ref_regmean(n, d, w, 0.9, 1e-6)),
    "osrm_aware": ({}, lambda a, n, d, w, r: ref_osrm_aware(n, d, w)),
    "osrm_aware rank": ({"rank": 2}, lambda a, n, d, w, r: ref_osrm_aware(n, d, w, 2)),
    "fisher": ({}, lambda a, n, d, w, r: ref_fisher(n, d, w)),
    "compose": (
        {"sparsifier": "trim", "density": 0.4, "consensus": "energy", "space": "core"},
        lambda a, n, d, w, r: ref_core_sce(a, n, w, 0.4),
    ),
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


def test_every_method_has_a_reference():
    drawn = {"della"}  # its draws are checked statistically in test_merge_parts
    assert {row.split()[0] for row in REFERENCES} | drawn == {m.name for m in list_methods()}


def test_the_tasks_own_updates_are_those_of_the_papers():
    emr, tall = (next(m for m in list_methods() if m.name == n) for n in ("emr", "tall_masks"))
    adapters = three(emr)
    weights = WEIGHTS[: len(adapters)]
    ours_emr, ours_tall = merge(emr, adapters), merge(tall, adapters)
    for layer in SHAPES:
        deltas = dense(adapters, layer)
        unified = ref_emr_unified(deltas, weights)
        total, masks = ref_tall(deltas, weights, 0.4)
        for task, (d, w) in enumerate(zip(deltas, weights, strict=True)):
            mask = (w * d * unified > 0).double()
            scale = (w * d).abs().sum() / (mask * unified).abs().sum()
            assert close(dense_of(ours_emr.of(task)[layer]), scale * mask * unified)
            assert close(dense_of(ours_tall.of(task)[layer]), masks[task] * total)


@pytest.mark.parametrize(
    ("named", "row"),
    [
        ("ties", {"sparsifier": "trim", "consensus": "elect"}),
        ("dare_linear", {"sparsifier": "random_drop"}),
        ("dare_ties", {"sparsifier": "random_drop", "consensus": "elect"}),
        ("della", {"sparsifier": "magprune", "consensus": "elect"}),
        ("magnitude_prune", {"sparsifier": "trim"}),
        ("breadcrumbs", {"sparsifier": "band"}),
        ("sce", {"consensus": "energy"}),
        ("task_arithmetic", {"space": "core"}),
        ("knots_ta", {"space": "knots"}),
        ("knots_ties", {"sparsifier": "trim", "consensus": "elect", "space": "knots"}),
        ("knots_dare_ties", {"sparsifier": "random_drop", "consensus": "elect", "space": "knots"}),
        ("core_space", {"sparsifier": "trim", "consensus": "elect", "space": "core"}),
    ],
)
def test_published_methods_are_rows_of_sparsifier_consensus_and_space(named, row):
    method, compose = (next(m for m in list_methods() if m.name == n) for n in (named, "compose"))
    shared = {} if named in ("sce", "task_arithmetic", "knots_ta") else {"density": 0.5}
    one, other = (
        merge(method, three(method), **shared),
        merge(compose, three(method), **row, **shared),
    )
    for layer in SHAPES:
        assert close(one.dense(layer), other.dense(layer))


INNER = [m for m in list_methods() if not m.needs and not m.per_task and not m.open_options]


@pytest.mark.parametrize("inner", INNER, ids=lambda m: m.name)
def test_the_core_space_takes_any_inner_method(inner):
    method = next(m for m in list_methods() if m.name == "core_space")
    adapters = three(inner)
    merged = merge(method, adapters, inner=inner.name)
    for layer in SHAPES:
        assert merged.dense(layer).isfinite().all()
    if inner.name in (
        "linear",
        "cat",
        "task_arithmetic",
        "svd",
        "knots_ta",
        "tsv_m",
        "iso_c",
        "wudi",
    ):
        for layer in SHAPES:  # they do not depend on the basis
            assert close(merged.dense(layer), merge(inner, adapters).dense(layer))


def test_an_inner_method_that_needs_more_than_adapters_is_refused():
    method = next(m for m in list_methods() if m.name == "core_space")
    for inner in ("regmean", "emr", "core_space"):
        with pytest.raises(MergeError, match=f"cannot be '{inner}'"):
            merge(method, three(method), inner=inner)


@pytest.mark.parametrize("name", ["regmean", "osrm_aware"])
def test_statistics_in_rows_give_what_the_full_moment_gives(name):
    """Few rows take Woodbury's way, a full moment Cholesky's."""
    method = next(m for m in list_methods() if m.name == name)
    g = torch.Generator().manual_seed(0)
    adapters = [
        {"q": LoraFactors(
            torch.randn(3, 30, generator=g, dtype=torch.float64),
            torch.randn(20, 3, generator=g, dtype=torch.float64),
        )}
        for _ in range(3)
    ]  # fmt: skip
    rows = [torch.randn(8, 30, generator=g, dtype=torch.float64) for _ in adapters]

    class Held:
        def __init__(self, moment):
            self.held = moment

        def moment(self, layer):
            return self.held

    few = [Held(RowMoment.from_rows(h)) for h in rows]
    full = [Held(SecondMoment(30).update(h)) for h in rows]
    for rank in (None, 2):
        a = merge(method, adapters, statistics=few, rank=rank)
        b = merge(method, adapters, statistics=full, rank=rank)
        assert close(a.dense("q"), b.dense("q"), 1e-7)


def test_osrm_aware_of_a_rank_disturbs_the_outputs_least():
    method = next(m for m in list_methods() if m.name == "osrm_aware")
    adapters = three(method)

    def disturbance(delta, layer):
        return sum(
            float((Statistics(i).rows(layer) @ (delta - w * d).T).square().sum())
            / float((Statistics(i).rows(layer) @ d.T).square().sum())
            for i, (d, w) in enumerate(zip(dense(adapters, layer), WEIGHTS, strict=True))
        )

    ours = merge(method, adapters, rank=2, ridge=1e-12)
    for other in ("svd", "regmean", "task_arithmetic", "tsv_m", "ties"):
        rival = merge(next(m for m in list_methods() if m.name == other), adapters, rank=2)
        for layer in SHAPES:
            assert disturbance(ours.dense(layer), layer) < disturbance(rival.dense(layer), layer)


def test_lora_lego_joins_units_that_are_alike_and_keeps_their_size():
    method = next(m for m in list_methods() if m.name == "lora_lego")
    a, b = torch.eye(6, dtype=torch.float64)[:2], torch.eye(5, dtype=torch.float64)[:, :2]
    twins = [{"q": LoraFactors(a, b)}, {"q": LoraFactors(a + 1e-6, b - 1e-6)}]
    merged = merge(method, twins, weights=1.0)
    assert merged.layers["q"].rank == 2
    assert close(merged.dense("q"), twins[0]["q"].delta(), 1e-5)


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
