"""What single methods promise beyond the suite: their papers' laws, and how they are related."""

import pytest
import torch
from dense_references import ref_emr_tasks, ref_tall
from small_merges import SHAPES, WEIGHTS, Statistics, adapter, close, dense, dense_of, merge, three

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import list_methods, merge_layers
from orthomerge.moments import RowMoment, SecondMoment


def test_the_tasks_own_updates_are_those_of_the_papers():
    emr, tall = (next(m for m in list_methods() if m.name == n) for n in ("emr", "tall_masks"))
    adapters = three(emr)
    weights = WEIGHTS[: len(adapters)]
    by_layer, ours_tall = merge(emr, adapters, rescale="layer"), merge(tall, adapters)
    for layer in SHAPES:
        deltas = dense(adapters, layer)
        alone = ref_emr_tasks({layer: deltas}, weights)
        total, masks = ref_tall(deltas, weights, 0.4)
        for task, expected in enumerate(alone):
            assert close(dense_of(by_layer.of(task)[layer]), expected[layer])
            assert close(dense_of(ours_tall.of(task)[layer]), masks[task] * total)


def test_emr_has_one_rescaler_per_task_and_model_as_the_published_codes_have():
    """Where tasks live in different layers a rescaler per layer is another method."""
    emr = next(m for m in list_methods() if m.name == "emr")
    adapters = three(emr)
    for number, adapter_ in enumerate(adapters):
        for layer, size in zip(SHAPES, (10.0, 0.1) if number % 2 else (0.1, 10.0), strict=True):
            f = adapter_[layer]
            adapter_[layer] = LoraFactors(f.A, f.B, f.scaling * size)
    expected = ref_emr_tasks({n: dense(adapters, n) for n in SHAPES}, WEIGHTS)
    ours, by_layer = (merge(emr, adapters, rescale=r) for r in ("model", "layer"))
    for workers in (1, 2):
        ours = merge(emr, adapters, workers=workers)
        for task, layers in enumerate(expected):
            for layer, update in layers.items():
                assert close(dense_of(ours.of(task)[layer]), update)
    assert apart_of(ours.of(0)["q"], by_layer.of(0)["q"]) > 0.3
    with pytest.raises(MergeError, match="option 'rescale'"):
        merge(emr, adapters, rescale="task")


def apart_of(a, b):
    return float((dense_of(a) - dense_of(b)).norm() / dense_of(a).norm())


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
        ("linear", {"space": "core"}),
        ("linear", {"space": "knots"}),
        ("knots_ties", {"sparsifier": "trim", "consensus": "elect", "space": "knots"}),
        ("knots_dare_ties", {"sparsifier": "random_drop", "consensus": "elect", "space": "knots"}),
        ("core_space", {"sparsifier": "trim", "consensus": "elect", "space": "core"}),
    ],
)
def test_published_methods_are_rows_of_sparsifier_consensus_and_space(named, row):
    method, compose = (next(m for m in list_methods() if m.name == n) for n in (named, "compose"))
    shared = {} if named in ("sce", "linear") else {"density": 0.5}
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
        "svd",
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
    for other in ("svd", "regmean", "linear", "tsv_m", "ties"):
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


def of_one_start(apart, count=8, rank=8, size=96):
    """Adapters that share an initialization of A and have left it by a share of its size."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(rank, size, generator=g, dtype=torch.float64)
    falling = torch.logspace(0, -2, rank, dtype=torch.float64)
    return [
        {
            "q": LoraFactors(
                start + apart * torch.randn(rank, size, generator=g, dtype=torch.float64),
                torch.randn(size, rank, generator=g, dtype=torch.float64) * falling,
            )
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("apart", [0.001, 0.03, 0.1, 0.3, 1.0, 3.0])
def test_wudi_does_not_double_the_norm_of_adapters_with_one_start(apart):
    adapters = of_one_start(apart)
    norm = {
        name: float(merge_layers(adapters, method=name).dense("q").norm())
        for name in ("linear", "wudi")
    }
    assert norm["wudi"] < 2 * norm["linear"]
    if apart in (0.03, 0.1):  # what a small ridge does to them
        small = merge_layers(adapters, method="wudi", ridge=0.01).dense("q")
        assert float(small.norm()) > 2 * norm["linear"]


class Held:
    """Statistics of one layer."""

    def __init__(self, moment):
        self.held = moment

    def moment(self, layer):
        return self.held


@pytest.mark.parametrize("apart", [0.001, 0.03, 0.3, 1e3], ids=lambda a: f"A apart by {a}")
@pytest.mark.parametrize("falling", [0, 1, 2, 3])
def test_regmean_of_few_rows_is_no_longer_than_the_updates_together(apart, falling):
    """Rows with a common mean, as features have; whether A is shared makes no difference."""
    adapters = of_one_start(apart, count=2, rank=4)
    g = torch.Generator().manual_seed(1)
    mean = 10 * torch.randn(96, generator=g, dtype=torch.float64)
    moments = []
    for _ in adapters:
        scales = torch.logspace(0, -falling, 96, dtype=torch.float64)
        order = torch.randperm(96, generator=g)
        rows = mean + torch.randn(8, 96, generator=g, dtype=torch.float64) * scales[order]
        moments.append(Held(SecondMoment(96).update(rows)))
    together = sum(float(a["q"].delta().norm()) for a in adapters)

    def length(**ridge):
        merged = merge_layers(adapters, method="regmean", statistics=moments, **ridge)
        return float(merged.dense("q").norm()) / together

    assert length() < 2
    if falling == 3:
        assert length(ridge=1e-6) > 5  # without a ridge to speak of, as in the paper


IN_THE_SPAN = ["svd", "tsv_m", "iso_c", "iso_cts", "knots_ties", "core_space", "pico", "wudi"]


@pytest.mark.parametrize("name", IN_THE_SPAN)
@pytest.mark.parametrize("shape", [(150, 96), (96, 150)], ids=str)
@pytest.mark.parametrize("apart", [0.01, 1.0], ids=lambda a: f"A apart by {a}")
def test_float32_takes_gram_matrices_and_gives_what_float64_gives_by_qr(name, shape, apart):
    """Also where adapters share an initialization of A: their rows are nearly dependent."""
    wide = of_one_start(apart, count=4, size=shape[1])
    g = torch.Generator().manual_seed(3)
    for adapter_ in wide:
        f = adapter_["q"]
        grow = torch.randn(shape[0], shape[1], generator=g, dtype=torch.float64) / shape[1] ** 0.5
        narrow = LoraFactors(f.A, grow @ f.B).to(torch.float32)
        adapter_["q"] = narrow.to(torch.float64)
    narrow = [{"q": a["q"].to(torch.float32)} for a in wide]
    options = {"density": 1.0} if name in ("knots_ties", "core_space") else {}
    exact, ours = (merge_layers(a, method=name, **options).dense("q") for a in (wide, narrow))
    assert float((ours.double() - exact).norm() / exact.norm()) < 1e-6
