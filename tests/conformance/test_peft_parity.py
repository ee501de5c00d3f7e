"""Ours against PEFT's `add_weighted_adapter`: equal where PEFT is right, and where it is not, why.

Facts read in peft/tuners/lora/model.py (0.21.2) and held by a test each below:

- "cat" and "svd" are the exact sum and its truncation, scaling applied once. Ours are equal.
- "ties", "dare_*" and "magnitude_prune" work on A and on B apart, with √|w·scaling| on both and
  the sign on A. Ours are equal with `space="factors"`; the "*_svd" variants work on the dense
  update and equal ours with `space="delta"` and a rank.
- "linear" adds the A_i and the B_i apart: (Σ √w_i B_i)(Σ √w_i A_i) has N² - N cross terms B_i A_j.
- With use_rslora the new adapter keeps the flag but gets lora_alpha = r, so its scaling is √r
  and not 1: every combination comes out √r times too large.
- With a single adapter every combination silently becomes "linear": the density is ignored.
- Ranks that differ are refused for all but "cat" and "*svd".
"""

from __future__ import annotations

import pytest
import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging import get_method, layer_seed, merge_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora import model as lora_model  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from peft.utils import merge_utils  # noqa: E402

# PEFT 0.18 applied the scaling and the sign twice, and did not rescale what DARE left.
RIGHT = bool((merge_utils.random_pruning(torch.ones(64), 0.5, rescale=True) > 1).any())
pytestmark = pytest.mark.skipif(not RIGHT, reason="this PEFT's own merges are wrong")

NAMES = ["one", "two", "three"]
WEIGHTS = [0.7, 1.3, 0.4]
RANK = 4
DENSITY = 0.45


def build(
    *, ranks=(RANK,) * 3, alphas=(8, 4, 6), targets=("query", "value"), **options
) -> peft.PeftModel:
    """A tiny random BERT with three LoRA adapters, A and B random."""
    torch.manual_seed(0)
    base = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=37,
            max_position_embeddings=16,
        )
    )
    model = None
    for name, r, alpha in zip(NAMES, ranks, alphas, strict=True):
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **options)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def modules(model) -> dict[str, LoraLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def adapters(model, names=NAMES) -> list[dict[str, LoraFactors]]:
    return [
        {
            layer: LoraFactors(
                m.lora_A[name].weight.detach(), m.lora_B[name].weight.detach(), m.scaling[name]
            )
            for layer, m in modules(model).items()
            if name in m.lora_A
        }
        for name in names
    ]


def peft_merge(model, combination, weights=WEIGHTS, names=NAMES, **options):
    """ΔW of each layer of a new PEFT adapter, which is taken away again."""
    model.base_model.add_weighted_adapter(
        list(names), list(weights), "merged", combination_type=combination, **options
    )
    deltas = {n: m.get_delta_weight("merged").detach() for n, m in modules(model).items()}
    model.delete_adapter("merged")
    return deltas


def true_sum(model, weights=WEIGHTS, names=NAMES):
    """Σ w_i ΔW_i, dense, in float64."""
    rows = adapters(model, names)
    return {
        layer: sum(
            w * a[layer].scaling * a[layer].B.double() @ a[layer].A.double()
            for a, w in zip(rows, weights, strict=True)
            if layer in a
        )
        for layer in modules(model)
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within 1e-5 of the norm. PEFT's float32 SVD is off by 1e-6; our results by 1e-7."""
    return bool((a.double() - b.double()).norm() <= 1e-5 * b.double().norm())


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a.double() - b.double()).norm() > 0.1 * b.double().norm())


@pytest.fixture(scope="module")
def model():
    return build()


SIGNED = [0.7, -1.3, 0.4]
SAME = [  # PEFT's combination, our method, options of both, our own options
    ("cat", "cat", {}, {}),
    ("cat", "linear", {}, {}),
    ("svd", "svd", {}, {}),
    ("ties", "ties", {"density": DENSITY}, {"space": "factors"}),
    (
        "ties",
        "ties",
        {"density": DENSITY, "majority_sign_method": "frequency"},
        {"space": "factors"},
    ),
    ("magnitude_prune", "magnitude_prune", {"density": DENSITY}, {"space": "factors"}),
    ("ties_svd", "ties", {"density": DENSITY}, {"rank": RANK}),
    (
        "ties_svd",
        "ties",
        {"density": DENSITY, "majority_sign_method": "frequency"},
        {"rank": RANK},
    ),
    ("magnitude_prune_svd", "magnitude_prune", {"density": DENSITY}, {"rank": RANK}),
]


@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED, [1, 1, 1]], ids=["plain", "signed", "ones"])
@pytest.mark.parametrize("combination, method, options, ours", SAME, ids=str)
def test_equal_to_peft(model, combination, method, options, ours, weights):
    theirs = peft_merge(model, combination, weights, **options)
    merged = merge_layers(adapters(model), method=method, weights=weights, **options, **ours)
    assert len(theirs) == 4
    for layer, delta in theirs.items():
        assert same(merged.dense(layer), delta)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("svd", [False, True], ids=["factors", "delta"])
def test_dare_equals_peft_on_the_same_draws(monkeypatch, method, svd):
    """One target layer, and the global generator seeded as ours just before PEFT's draws."""
    one = build(targets=["encoder.layer.0.attention.self.query"])
    (layer,) = modules(one)

    def reseed(*_):  # PEFT calls this between making the new adapter and merging into it
        torch.manual_seed(layer_seed(7, layer))

    monkeypatch.setattr(lora_model, "_freeze_adapter", reseed)
    theirs = peft_merge(one, f"{method}_svd" if svd else method, density=DENSITY)
    own = {"rank": RANK} if svd else {"space": "factors"}
    merged = merge_layers(
        adapters(one), method=method, weights=WEIGHTS, seed=7, density=DENSITY, **own
    )
    assert same(merged.dense(layer), theirs[layer])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "ties", "magnitude_prune"])
def test_the_dense_merge_equals_peft_utils(model, method):
    """Every layer's dense update through `peft.utils.merge_utils`, with our seed of the layer."""
    rows = adapters(model)
    merged = merge_layers(rows, method=method, weights=WEIGHTS, seed=3, density=DENSITY)
    for layer in modules(model):
        torch.manual_seed(layer_seed(3, layer))
        function = getattr(merge_utils, method)
        delta = function([a[layer].delta() for a in rows], torch.tensor(WEIGHTS), DENSITY)
        assert same(merged.dense(layer), delta)


def test_without_a_generator_the_global_one_is_drawn_from_as_in_peft(model):
    rows, layer = adapters(model), next(iter(modules(model)))
    torch.manual_seed(11)
    theirs = merge_utils.dare_linear(
        [a[layer].delta() for a in rows], torch.tensor(WEIGHTS), DENSITY
    )
    torch.manual_seed(11)
    ours = get_method("dare_linear").function([a[layer] for a in rows], WEIGHTS, density=DENSITY)
    assert same(ours, theirs)


def test_a_layer_that_one_adapter_lacks():
    partial = build()
    for name, module in modules(partial).items():
        if name.endswith("value"):
            module.delete_adapter("two")
    for combination, method in (("cat", "linear"), ("ties_svd", "ties")):
        options = {"density": DENSITY} if method == "ties" else {}
        theirs = peft_merge(partial, combination, **options)
        rank = {"rank": RANK} if method == "ties" else {}
        merged = merge_layers(adapters(partial), method=method, weights=WEIGHTS, **options, **rank)
        for layer, delta in theirs.items():
            assert same(merged.dense(layer), delta)


# ---------------------------------------------------------------------------------------------
# Where PEFT's result is not the sum it names.


@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED], ids=["plain", "signed"])
def test_peft_linear_has_cross_terms_and_ours_is_the_sum(model, weights):
    """PEFT adds √w_i A_i and √w_i B_i apart; the product pairs B_i with A_j for every i, j."""
    theirs, exact = peft_merge(model, "linear", weights), true_sum(model, weights)
    merged = merge_layers(adapters(model), method="linear", weights=weights)
    for layer in exact:
        rows = [a[layer] for a in adapters(model)]
        both = torch.tensor([w * f.scaling for w, f in zip(weights, rows, strict=True)])
        root = both.abs().sqrt()
        A = sum(s * f.A for s, f in zip(root * both.sign(), rows, strict=True))
        B = sum(s * f.B for s, f in zip(root, rows, strict=True))
        assert same(theirs[layer], B @ A)
        assert far(theirs[layer], exact[layer])
        assert same(merged.dense(layer), exact[layer])


@pytest.mark.parametrize("combination", ["cat", "svd", "ties_svd"])
def test_peft_scales_rslora_merges_by_the_root_of_the_rank(combination):
    """The new config copies use_rslora and sets lora_alpha = r, so its scaling is r/√r, not 1."""
    rslora = build(use_rslora=True)
    method = {"cat": "linear", "svd": "svd", "ties_svd": "ties"}[combination]
    options = {"density": DENSITY} if method == "ties" else {}
    theirs = peft_merge(rslora, combination, **options)
    rank = None if combination == "cat" else RANK
    merged = merge_layers(adapters(rslora), method=method, weights=WEIGHTS, rank=rank, **options)
    new_rank = 3 * RANK if combination == "cat" else RANK
    for layer, exact in true_sum(rslora).items():
        assert same(theirs[layer] / new_rank**0.5, merged.dense(layer))
        assert far(theirs[layer], merged.dense(layer))
        if combination == "cat":
            assert same(merged.dense(layer), exact)


def test_peft_reads_plain_scaling_and_rslora_scaling_of_the_inputs():
    """The inputs' own scalings (alpha/√r here) are read from the layer: only the output is off."""
    rslora = build(use_rslora=True)
    scalings = [a[next(iter(modules(rslora)))].scaling for a in adapters(rslora)]
    assert scalings == [8 / 2, 4 / 2, 6 / 2]


def test_peft_ignores_the_density_for_a_single_adapter(model):
    """One adapter turns every combination into "linear"; ours trims it as asked."""
    theirs = peft_merge(model, "ties_svd", [1.0], NAMES[:1], density=DENSITY)
    rows = adapters(model, NAMES[:1])
    merged = merge_layers(rows, method="ties", density=DENSITY)
    for layer, whole in true_sum(model, [1.0], NAMES[:1]).items():
        assert same(theirs[layer], whole)
        kept = int((merged.dense(layer) != 0).sum())
        assert kept == int(DENSITY * whole.numel())


def test_peft_refuses_ranks_that_differ_and_ours_is_the_sum():
    mixed = build(ranks=(2, 4, 3))
    with pytest.raises(ValueError, match="same r value"):
        peft_merge(mixed, "linear")
    merged = merge_layers(adapters(mixed), method="linear", weights=WEIGHTS)
    for layer, exact in true_sum(mixed).items():
        assert same(merged.dense(layer), exact)


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("combination", ["ties", "magnitude_prune"])
def test_the_factor_space_is_not_the_dense_method(model, combination):
    """Even with nothing pruned, pruning A and B apart leaves PEFT's cross terms in."""
    theirs = peft_merge(model, combination, density=1.0)
    merged = merge_layers(adapters(model), method=combination, weights=WEIGHTS, density=1.0)
    for layer, delta in theirs.items():
        assert far(delta, merged.dense(layer))
