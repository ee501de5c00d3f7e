"""Ours against mergekit on full models: equal where the options correspond, and where not, why.

A random Llama in float64, three adapters of it that have something in common, and the full models
PEFT makes of them; mergekit merges those, and what it adds to the base is compared with our merge
of the adapters. mergekit is run, never copied (LGPL): as a program of its own, in this environment
(`pip install ".[mergekit]"`) or in that of `ORTHOMERGE_MERGEKIT_PYTHON`.

Facts read in mergekit 0.1.5 (`sparsify.py`, `merge_methods/`) and held by a test each below:

- Equal with the same options: task_arithmetic, breadcrumbs, sce, model_stock; ties, dare_ties and
  della where all weights are 1 and `normalize: true`. "linear" is ours with `normalize=True`.
- Composed ones: "breadcrumbs_ties" is `compose` with band × elect, "della_linear" magprune × sum.
- "nuslerp" with a base model is our slerp, of the updates. "slerp" goes along the arc between the
  whole weights, of which the updates are a small part: it is nearly the line between them.
- Weights in a sign election: mergekit elects by the sum of the weighted updates and divides by the
  sum of the weights that agree, so that equal weights w cancel out. Ours, as PEFT's, elects by the
  updates themselves and divides by the number that agree. TIES itself has no weights.
- `normalize: false`, which is dare_ties' default there, leaves the sum of those that agree; ours
  is the mean, as in TIES.
- `rescale` (default in dare_* and della) scales what is kept to the L1 norm from before. The papers
  divide by the probability to keep, as ours does, which makes the expectation the update itself.
- della's `epsilon` is half the width of the window of probabilities, ours the width, as the
  paper's; where one row is as long as another, theirs at ε is ours at 2 ε.
- breadcrumbs with density + gamma above 1 takes fewer outliers away; ours refuses.
- model_stock of opposed updates (a negative mean cosine) goes beyond the base, against the mean;
  ours stays at the base.
- sce there takes no weights.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orthomerge.adapters import Adapter, read_adapter
from orthomerge.adapters.full_model import save_full_model
from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import merge_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VARIABLE = "ORTHOMERGE_MERGEKIT_PYTHON"
PYTHON = os.environ.get(VARIABLE) or (
    sys.executable if importlib.util.find_spec("mergekit") else None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason=f"mergekit is not installed: pip install '.[mergekit]', or set {VARIABLE} to the "
        "interpreter of an environment that has it",
    ),
]

WEIGHTS = [0.7, 1.3, 0.4]
ONES = [1.0, 1.0, 1.0]
DENSITY, GAMMA, EPSILON = 0.45, 0.03, 0.3

_DRIVER = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
for name, config in json.load(sys.stdin).items():
    run_merge(MergeConfiguration.model_validate(config), name, options)
"""

# What mergekit runs: method, weights (None for a method without), parameters, which models.
RUNS: dict[str, tuple[str, list[float] | None, dict, list[int]]] = {
    "linear": ("linear", WEIGHTS, {}, [0, 1, 2]),
    "task_arithmetic": ("task_arithmetic", WEIGHTS, {"lambda": 0.6}, [0, 1, 2]),
    "task_arithmetic normalized": ("task_arithmetic", WEIGHTS, {"normalize": True}, [0, 1, 2]),
    "ties": ("ties", ONES, {"density": DENSITY, "lambda": 0.6}, [0, 1, 2]),
    "ties whole": ("ties", ONES, {"density": 1.0}, [0, 1, 2]),
    "ties weighted": ("ties", WEIGHTS, {"density": DENSITY}, [0, 1, 2]),
    "ties halves": ("ties", [0.5] * 3, {"density": DENSITY}, [0, 1, 2]),
    "ties summed": ("ties", ONES, {"density": DENSITY, "normalize": False}, [0, 1, 2]),
    "dare_linear whole": ("dare_linear", WEIGHTS, {"density": 1.0}, [0, 1, 2]),
    "dare_linear": ("dare_linear", [1.0], {"density": DENSITY}, [0]),
    "dare_linear plain": ("dare_linear", [1.0], {"density": DENSITY, "rescale": False}, [0]),
    "dare_ties whole": ("dare_ties", ONES, {"density": 1.0, "normalize": True}, [0, 1, 2]),
    "dare_ties summed": ("dare_ties", ONES, {"density": 1.0}, [0, 1, 2]),
    "della whole": ("della", ONES, {"density": 1.0}, [0, 1, 2]),
    "della_linear whole": ("della_linear", WEIGHTS, {"density": 1.0}, [0, 1, 2]),
    "della_linear": ("della_linear", [1.0], {"density": 0.5, "epsilon": EPSILON}, [0]),
    "breadcrumbs": ("breadcrumbs", WEIGHTS, {"density": DENSITY, "gamma": GAMMA}, [0, 1, 2]),
    "breadcrumbs full": ("breadcrumbs", ONES, {"density": 0.99, "gamma": GAMMA}, [0, 1, 2]),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        ONES,
        {"density": DENSITY, "gamma": GAMMA, "normalize": True},
        [0, 1, 2],
    ),
    "sce": ("sce", None, {}, [0, 1, 2]),
    "sce selected": ("sce", None, {"select_topk": 0.3}, [0, 1, 2]),
    "model_stock": ("model_stock", None, {}, [0, 1, 2]),
    "model_stock opposed": ("model_stock", None, {}, [0, 3]),
    "nuslerp": ("nuslerp", [1.0, 3.0], {}, [0, 1]),
    "slerp": ("slerp", None, {"t": 0.75}, [0, 1]),
}
_PER_MODEL = ("density", "gamma", "epsilon")


def config(folder: Path, run: str) -> dict:
    """The mergekit configuration of a run, parameters where mergekit wants them."""
    method, weights, parameters, chosen = RUNS[run]
    own = {k: v for k, v in parameters.items() if k in _PER_MODEL}
    models = [{"model": str(folder / f"full{n}"), "parameters": dict(own)} for n in chosen]
    for number, weight in enumerate(weights or []):
        models[number]["parameters"]["weight"] = weight
    result = {
        "merge_method": method,
        "models": models,
        "parameters": {k: v for k, v in parameters.items() if k not in _PER_MODEL},
        "dtype": "float64",
    }
    if method == "slerp":
        result["base_model"] = models[0]["model"]
    elif method != "linear":
        result["base_model"] = str(folder / "base")
    return result


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def make_adapters(folder: Path) -> list[Adapter]:
    """Three adapters with a part in common and one of their own, and a fourth opposed to them."""
    torch.manual_seed(1)
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    )
    lora = {k: p for k, p in model.named_parameters() if "lora_" in k}
    common = {k: torch.randn_like(p, dtype=torch.float64) for k, p in lora.items()}
    found = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        for k, p in lora.items():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            sign = -1 if number == 3 and "lora_B" in k else 1
            p.data = sign * 0.1 * (common[k] + 0.8 * noise)
        model.save_pretrained(folder / f"a{number}", save_embedding_layers=False)
        found.append(read_adapter(folder / f"a{number}"))
    return found


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The adapters' layers, and what every run of mergekit added to the base, by layer."""
    folder = tmp_path_factory.mktemp("mergekit")
    llama().save_pretrained(folder / "base")
    adapters = make_adapters(folder)
    for number, adapter in enumerate(adapters):
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=torch.float64
        )
        whole = peft.PeftModel.from_pretrained(base, adapter.path).merge_and_unload()
        whole.save_pretrained(folder / f"full{number}")
    configs = {str(folder / run): config(folder, run) for run in RUNS}
    done = subprocess.run(
        [str(PYTHON), "-c", _DRIVER], input=json.dumps(configs), text=True, capture_output=True,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before = weights(folder / "base")
    added = {run: difference(weights(folder / run), before) for run in RUNS}
    return [dict(a.layers) for a in adapters], added, folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def difference(after, before):
    assert set(after) == set(before)
    return {k.removesuffix(".weight"): after[k] - before[k] for k in before}


def same(ours, theirs) -> bool:
    """Within 1e-8 of the norm: what cancels when the base is taken away again, in float64."""
    return bool((ours - theirs).norm() <= 1e-8 * theirs.norm().clamp_min(1e-6))


def far(ours, theirs) -> bool:
    return bool((ours - theirs).norm() > 0.02 * theirs.norm())


def ours(layers, method, weights, chosen=(0, 1, 2), **options):
    update = merge_layers([layers[n] for n in chosen], method=method, weights=weights, **options)
    return {name: update.dense(name) for name in update.layers}


def all_same(ours, theirs) -> bool:
    """Every adapted layer is equal and no other tensor was touched."""
    rest = [value for name, value in theirs.items() if name not in ours]
    return all(same(ours[n], theirs[n]) for n in ours) and all(
        bool((v.abs() < 1e-14).all()) for v in rest
    )


SAME = [  # mergekit's run, our method, our weights, our options
    ("linear", "linear", WEIGHTS, {"normalize": True}),
    ("task_arithmetic", "task_arithmetic", WEIGHTS, {"lambda": 0.6}),
    ("task_arithmetic normalized", "linear", WEIGHTS, {"normalize": True}),
    ("ties", "ties", ONES, {"density": DENSITY, "lambda": 0.6}),
    ("ties whole", "ties", ONES, {"density": 1.0}),
    ("dare_linear whole", "dare_linear", WEIGHTS, {"density": 1.0}),
    ("dare_ties whole", "dare_ties", ONES, {"density": 1.0}),
    ("della whole", "della", ONES, {"density": 1.0}),
    ("della_linear whole", "compose", WEIGHTS, {"sparsifier": "magprune", "density": 1.0}),
    ("breadcrumbs", "breadcrumbs", WEIGHTS, {"density": DENSITY, "gamma": GAMMA}),
    (
        "breadcrumbs_ties",
        "compose",
        ONES,
        {"sparsifier": "band", "consensus": "elect", "density": DENSITY, "gamma": GAMMA},
    ),
    ("sce", "sce", ONES, {}),
    ("sce selected", "sce", ONES, {"select_topk": 0.3}),
    ("model_stock", "model_stock", ONES, {}),
    ("nuslerp", "slerp", [1.0, 3.0], {}),
]


@pytest.mark.parametrize("run, method, weights, options", SAME, ids=[row[0] for row in SAME])
def test_equal_to_mergekit(merged, run, method, weights, options):
    layers, added, _ = merged
    chosen = RUNS[run][3]
    mine = ours(layers, method, weights, chosen, **options)
    assert len(mine) == 21
    assert all_same(mine, added[run])


def test_our_full_model_is_theirs(merged, tmp_path):
    """The whole way: adapters merged and written as a full model, against mergekit's folder."""
    layers, _, folder = merged
    update = merge_layers(layers[:3], method="ties", weights=ONES, density=DENSITY, lambda_=0.6)
    save_full_model(tmp_path / "out", folder / "base", update.layers.get, names=list(update.layers))
    mine, theirs = weights(tmp_path / "out"), weights(folder / "ties")
    assert set(mine) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------------------------------------
# Where the two differ


def trimmed(layers, layer):
    """The three updates of a layer, trimmed as in TIES."""
    return torch.stack(
        [
            merge_layers([{layer: a[layer]}], method="magnitude_prune", density=DENSITY).dense(
                layer
            )
            for a in layers[:3]
        ]
    )


def test_mergekit_elects_and_normalizes_by_weight(merged):
    layers, added, _ = merged
    w = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
    mine = ours(layers, "ties", WEIGHTS, density=DENSITY)
    for layer, value in mine.items():
        updates = trimmed(layers, layer)

        def mean(elected, divisor, updates=updates):
            agrees = updates.sign() == torch.where(elected.sum(0) >= 0, 1, -1)
            count = (divisor * agrees).sum(0)
            return (w * updates * agrees).sum(0) / torch.where(count == 0, 1, count)

        assert same(mean(w * updates, w), added["ties weighted"][layer])
        assert same(mean(updates, torch.ones_like(w)), value)
        assert far(value, added["ties weighted"][layer])


def test_equal_weights_cancel_in_mergekit(merged):
    layers, added, _ = merged
    assert all_same(ours(layers, "ties", ONES, density=DENSITY), added["ties halves"])
    halves = ours(layers, "ties", [0.5] * 3, density=DENSITY)
    assert all(same(2 * value, added["ties halves"][n]) for n, value in halves.items())


@pytest.mark.parametrize("run", ["ties summed", "dare_ties summed"])
def test_without_normalize_mergekit_sums_those_that_agree(merged, run):
    layers, added, _ = merged
    density = RUNS[run][2]["density"]
    for layer, value in ours(layers, "ties", ONES, density=density).items():
        updates = torch.stack([a[layer].delta() for a in layers[:3]])
        updates = trimmed(layers, layer) if density < 1 else updates
        agrees = updates.sign() == torch.where(updates.sum(0) >= 0, 1, -1)
        assert same((updates * agrees).sum(0), added[run][layer])
        assert same(value * agrees.sum(0), added[run][layer])
        assert far(value, added[run][layer])


def kept(layers, values, layer):
    """Which entries of the first adapter's update were kept, and what they were multiplied by."""
    delta = layers[0][layer].delta()
    mask = values[layer].abs() > 1e-9 * delta.abs().max()
    return mask, (values[layer] / delta)[mask].double()


def test_dare_keeps_the_l1_norm_in_mergekit_and_the_expectation_here(merged):
    layers, added, _ = merged
    mine = ours(layers, "dare_linear", 1.0, [0], density=DENSITY)
    shares = []
    for layer, value in mine.items():
        delta = layers[0][layer].delta()
        assert torch.allclose(kept(layers, mine, layer)[1], torch.tensor(1 / DENSITY).double())
        mask, factor = kept(layers, added["dare_linear"], layer)
        expected = delta.abs().sum() / delta[mask].abs().sum()
        assert torch.allclose(factor, expected.expand_as(factor), rtol=1e-6)
        assert float(expected) != pytest.approx(1 / DENSITY, rel=1e-5)
        plain_mask, plain = kept(layers, added["dare_linear plain"], layer)
        assert torch.allclose(plain, torch.ones_like(plain), rtol=1e-6)
        shares.append((int(mask.sum()) + int(plain_mask.sum()), 2 * value.numel()))
    count, total = (sum(x) for x in zip(*shares, strict=True))
    assert abs(count / total - DENSITY) < 5 * math.sqrt(DENSITY * (1 - DENSITY) / total)


def thirds(layers, values):
    """The share kept of the smallest and of the largest third of each row."""
    low, high = [], []
    for layer in layers[0]:
        delta = layers[0][layer].delta()
        mask = kept(layers, values, layer)[0].double()
        ordered = mask.gather(1, delta.abs().argsort(dim=1))
        third = ordered.shape[1] // 3
        low.append(ordered[:, :third].flatten())
        high.append(ordered[:, -third:].flatten())
    return float(torch.cat(low).mean()), float(torch.cat(high).mean())


def test_epsilon_is_half_the_window_in_mergekit_and_the_window_here(merged):
    """The outer thirds are kept with d ± 2/3 of half the window: 0.3 and 0.7, or 0.4 and 0.6."""
    layers, added, _ = merged
    options = {"sparsifier": "magprune", "density": 0.5}
    twice = ours(layers, "compose", 1.0, [0], epsilon=2 * EPSILON, **options)
    once = ours(layers, "compose", 1.0, [0], epsilon=EPSILON, **options)
    assert thirds(layers, added["della_linear"]) == pytest.approx((0.3, 0.7), abs=0.02)
    assert thirds(layers, twice) == pytest.approx((0.3, 0.7), abs=0.02)
    assert thirds(layers, once) == pytest.approx((0.4, 0.6), abs=0.02)


def test_breadcrumbs_that_do_not_fit_are_refused_here(merged):
    layers, added, _ = merged
    with pytest.raises(MergeError, match="at most 1"):
        ours(layers, "breadcrumbs", ONES, density=0.99, gamma=GAMMA)
    for layer in layers[0]:
        total = torch.zeros_like(added["breadcrumbs full"][layer])
        for a in layers[:3]:
            delta = a[layer].delta()
            flat = delta.abs().flatten()
            lowest = flat.argsort()[: int(0.99 * len(flat))]  # all but the largest hundredth
            total.view(-1)[lowest] += delta.flatten()[lowest]
        assert same(total, added["breadcrumbs full"][layer])


def test_model_stock_of_opposed_updates(merged):
    """t = N cos / (1 + (N-1) cos) is negative for a negative cosine; ours is the base then."""
    layers, added, _ = merged
    mine = ours(layers, "model_stock", ONES[:2], [0, 3])
    for layer, value in mine.items():
        first, second = (layers[n][layer].delta() for n in (0, 3))
        cosine = float((first * second).sum() / (first.norm() * second.norm()))
        assert cosine < 0
        assert not value.any()
        t = 2 * cosine / (1 + cosine)
        assert same(t * (first + second) / 2, added["model_stock opposed"][layer])


def test_slerp_of_whole_weights_is_another_thing(merged):
    """Their arc is that between W + ΔW_1 and W + ΔW_2, ours that between ΔW_1 and ΔW_2."""
    layers, added, folder = merged
    base = weights(folder / "base")
    full = [weights(folder / f"full{n}") for n in (0, 1)]
    for layer, value in ours(layers, "slerp", [0.25, 0.75], [0, 1]).items():
        key = f"{layer}.weight"
        a, b = (f[key] for f in full)
        angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
        arc = (math.sin(0.25 * angle) * a + math.sin(0.75 * angle) * b) / math.sin(angle)
        assert same(arc - base[key], added["slerp"][layer])
        assert far(value, added["slerp"][layer])


def test_sce_there_takes_no_weights(merged):
    """Ours with weights weighs every update before it is selected and measured."""
    layers, added, _ = merged
    scaled = [
        {n: LoraFactors(f.A, f.B, w * f.scaling) for n, f in a.items()}
        for a, w in zip(layers, WEIGHTS, strict=False)
    ]
    weighted, unit = ours(layers, "sce", WEIGHTS), ours(scaled, "sce", ONES)
    for layer, value in weighted.items():
        assert same(value, unit[layer])
        assert far(value, added["sce"][layer])
