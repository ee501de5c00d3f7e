"""Adapters of packed experts (`target_parameters`), against PEFT's own forward pass."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from mixtures import (
    BOTH,
    EVERY,
    EXPERTS,
    INSIDE,
    MIXTURES,
    PRESENT_LAYOUT,
    WIDE,
    mixtral,
    qwen3_moe,
)
from odd_adapters import (
    WEIGHTS,
    by_peft,
    close,
    configured,
    drawn,
    logits,
    refusal,
    rewritten,
    saved,
)
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import ties
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orthomerge import merge_loaded_adapters
from orthomerge.adapters import merge_adapters, merge_to_model, read_adapter
from orthomerge.adapters.experts import packed, split
from orthomerge.factors import LoraFactors
from orthomerge.merging import list_methods

pytestmark = PRESENT_LAYOUT


def adapter(folder, make, seed, base="", **config):
    options = {"target_modules": ["q_proj"], "target_parameters": BOTH} | config
    return saved(folder, make, seed, base=base, **options)


def deltas(folder, make):
    """The update of every weight by its name, as PEFT works it out."""
    wrapped, found = by_peft(folder, make()), {}
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            leaf = getattr(module, "parameter_name", "weight")
            found[f"{name.replace('.base_layer', '')}.{leaf}"] = module.get_delta_weight("default")
    return found


def plus(make, updates):
    """The base with updates added to its weights."""
    model = make()
    with torch.no_grad():
        for name, update in updates.items():
            model.get_parameter(name).add_(update)
    return model


def per_matrix(function, *updates):
    """A function of matrices, of each expert's where a tensor is of experts."""
    if updates[0].ndim == 2:
        return function(*updates)
    return torch.stack([function(*matrices) for matrices in zip(*updates, strict=True)])


@EVERY
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_parameters": BOTH[:1]},
        {"target_parameters": BOTH[1:], "use_rslora": True},
        {"target_modules": [], "rank_pattern": {"gate_up_proj": 2, r"layers.1\..*down_proj": 5}},
        {"target_parameters": ["gate_up_proj", "down_proj"], "alpha_pattern": {"down_proj": 1}},
    ],
    ids=["both", "first", "second", "ranks", "bare names"],
)
def test_one_adapter_gives_itself(tmp_path, make, config):
    a = adapter(tmp_path / "a", make, 1, **config)
    merge_adapters([a], weights=1.0, output=tmp_path / "out")
    expected = logits(by_peft(a, make()))
    assert not torch.allclose(expected, logits(make()), atol=1e-2)
    close(logits(by_peft(tmp_path / "out", make())), expected)
    named = read_adapter(tmp_path / "out").config["target_parameters"]
    assert sorted(named) == sorted(config.get("target_parameters", BOTH))


@EVERY
def test_layers_are_those_of_single_experts(tmp_path, make):
    a = adapter(tmp_path / "a", make, 1)
    layers = read_adapter(a).layers
    expected = deltas(a, make)
    transposed = make().config.model_type == "gpt_oss"
    assert f"model.layers.0.mlp.experts.gate_up_proj.{EXPERTS - 1}" in layers
    assert layers["model.layers.1.mlp.experts.down_proj.0"].shape == (WIDE, INSIDE)
    for name, factors in layers.items():
        tensor, _, number = name.rpartition(".")
        if number.isdigit():
            own = expected[tensor][int(number)]
            torch.testing.assert_close(factors.delta(), own.T if transposed else own)


@EVERY
def test_a_sum_of_two(tmp_path, make):
    base = tmp_path / "base"
    make().save_pretrained(base)
    a = adapter(tmp_path / "a", make, 1, base)
    b = adapter(tmp_path / "b", make, 2, base, target_parameters=BOTH[:1], r=2)
    merge_adapters([a, b], weights=[0.7, 0.4], output=tmp_path / "out")
    one, other = deltas(a, make), deltas(b, make)
    summed = {name: 0.7 * d + 0.4 * other.get(name, torch.zeros(())) for name, d in one.items()}
    close(logits(by_peft(tmp_path / "out", make())), logits(plus(make, summed)))


@EVERY
@pytest.mark.parametrize("method", ["ties", "svd"])
def test_a_method_works_on_each_expert(tmp_path, make, method):
    a, b = (adapter(tmp_path / n, make, i) for i, n in enumerate("ab", start=1))
    rank = "full" if method == "ties" else 2
    options = {"density": 0.5} if method == "ties" else {}
    merge_adapters(
        [a, b], method=method, weights=[0.7, 0.4], rank=rank, output=tmp_path / "out", **options
    )

    def by_hand(one, other):
        if method == "ties":
            return ties([one, other], torch.tensor([0.7, 0.4]), density=0.5)
        U, S, V = torch.linalg.svd((0.7 * one + 0.4 * other).double(), full_matrices=False)
        return ((U[:, :2] * S[:2]) @ V[:2]).float()

    one, other = deltas(a, make), deltas(b, make)
    expected = {name: per_matrix(by_hand, one[name], other[name]) for name in one}
    close(logits(by_peft(tmp_path / "out", make())), logits(plus(make, expected)))


def test_every_method_writes_what_peft_reads(tmp_path):
    adapters = [adapter(tmp_path / n, mixtral, i) for i, n in enumerate("ab", start=1)]
    for method in list_methods():
        if method.needs or method.per_task:
            continue
        out = tmp_path / method.name
        merged = merge_adapters(adapters, method=method.name, output=out)
        got = deltas(out, mixtral)
        for name, factors in merged.layers.items():
            tensor, _, number = name.rpartition(".")
            if number.isdigit():
                expected = got[tensor][int(number)]
                torch.testing.assert_close(factors.delta(), expected, atol=1e-5, rtol=1e-4)


def test_each_task_keeps_its_own(tmp_path):
    a, b = (adapter(tmp_path / n, mixtral, i) for i, n in enumerate("ab", start=1))
    merge_adapters([a, b], method="tall_masks", output=tmp_path / "out")
    for task in "ab":
        assert by_peft(tmp_path / "out" / "tasks" / task, mixtral())


def test_a_router_is_a_matrix(tmp_path):
    targets = [*BOTH, "mlp.gate.weight"]
    a, b = (
        adapter(tmp_path / n, mixtral, i, target_parameters=targets)
        for i, n in ((1, "a"), (2, "b"))
    )
    merge_adapters([a, b], weights=[0.7, 0.4], output=tmp_path / "out")
    assert read_adapter(a).shapes["model.layers.0.mlp.gate"] == (EXPERTS, WIDE)
    one, other = deltas(a, mixtral), deltas(b, mixtral)
    summed = {name: 0.7 * one[name] + 0.4 * other[name] for name in one}
    close(logits(by_peft(tmp_path / "out", mixtral())), logits(plus(mixtral, summed)))


def test_names_below_the_head_are_the_same_experts(tmp_path):
    base = tmp_path / "base"
    mixtral().save_pretrained(base)
    a = adapter(tmp_path / "a", mixtral, 1, base)
    bare = saved(tmp_path / "b", lambda: mixtral().model, 1, base=base, target_modules=["q_proj"],
                 target_parameters=BOTH)  # fmt: skip
    merged = merge_adapters([a, bare], weights=[0.5, 0.5], output=tmp_path / "out")
    assert set(merged.layers) == set(read_adapter(a).layers)
    close(logits(by_peft(tmp_path / "out", mixtral())), logits(by_peft(a, mixtral())))


def test_adapters_in_a_model(tmp_path):
    model = drawn(mixtral(), 1, target_modules=["q_proj"], target_parameters=BOTH)
    other = adapter(tmp_path / "b", mixtral, 2, r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "a")
        model.load_adapter(str(other), "other")
        merge_loaded_adapters(model, ["default", "other"], "merged", weights=[0.7, 0.4])
    model.set_adapter("merged")
    merge_adapters([tmp_path / "a", other], weights=[0.7, 0.4], output=tmp_path / "out")
    close(logits(model), logits(by_peft(tmp_path / "out", mixtral())))


def test_experts_of_several_ranks_are_filled_up():
    torch.manual_seed(0)
    experts = [LoraFactors(torch.randn(r, 5), torch.randn(7, r), 0.5 * r) for r in (1, 3, 2)]
    A, B, rank = packed(experts)
    assert (rank, A.shape, B.shape) == (3, (9, 5), (7, 9))
    for before, after in zip(experts, split(A, B, 1.0, 3), strict=True):
        torch.testing.assert_close(after.delta(), before.delta())


def test_experts_of_another_number_or_base_are_refused(tmp_path):
    base = tmp_path / "base"
    mixtral().save_pretrained(base)
    a = adapter(tmp_path / "a", mixtral, 1, base)
    b = adapter(tmp_path / "b", lambda: mixtral(num_local_experts=EXPERTS + 1), 2, base)
    assert f"{EXPERTS + 1} experts" in refusal("merge", a, b, "-o", tmp_path / "out")
    configured(b, base_model_name_or_path=None)
    configured(a, base_model_name_or_path=None)
    assert "experts" in refusal("merge", a, b, "-o", tmp_path / "out")


def test_the_layout_of_an_older_peft_is_refused(tmp_path):
    base = tmp_path / "base"
    mixtral().save_pretrained(base)
    a = adapter(tmp_path / "a", mixtral, 1, base, target_parameters=BOTH[:1], target_modules=[])
    tensors = load_file(a / WEIGHTS)
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    turned = {
        re.sub("lora_[AB]", lambda part: other[part[0]], key): tensor.T.contiguous()
        for key, tensor in tensors.items()
    }
    save_file(turned, a / WEIGHTS)
    assert "0.19.1" in refusal("merge", a, "-o", tmp_path / "out")
    configured(a, base_model_name_or_path=None, peft_version="0.18.0")
    assert "--base" in refusal("merge", a, "-o", tmp_path / "out")


def test_pairs_that_no_target_explains_are_refused(tmp_path):
    a = adapter(tmp_path / "a", mixtral, 1)
    configured(a, target_parameters=BOTH[:1])
    assert "target_parameters" in refusal("merge", a, "-o", tmp_path / "out")
    b = adapter(tmp_path / "b", mixtral, 1)
    configured(b, target_parameters=["experts.gate_up_proj", "experts.something"])
    assert "something" in refusal("merge", b, "-o", tmp_path / "out")
    c = adapter(tmp_path / "c", mixtral, 1)
    rewritten(c, lambda key: None if "base_layer.lora_B" in key else key)
    assert "lora_B" in refusal("merge", c, "-o", tmp_path / "out")


def test_packed_and_single_experts_together_are_refused(tmp_path):
    base = tmp_path / "base"
    qwen3_moe().save_pretrained(base)
    a = adapter(tmp_path / "a", qwen3_moe, 1, base)
    b = adapter(tmp_path / "b", qwen3_moe, 2, base, target_parameters=None)
    single = "base_model.model.model.layers.0.mlp.experts.0.down_proj"
    tensors = load_file(b / WEIGHTS)
    tensors[f"{single}.lora_A.weight"] = torch.ones(3, INSIDE)
    tensors[f"{single}.lora_B.weight"] = torch.ones(WIDE, 3)
    save_file(tensors, b / WEIGHTS)
    assert "single experts" in refusal("merge", a, b, "-o", tmp_path / "out")


@EVERY
@pytest.mark.parametrize("form", ["as the hub has it", "experts in one tensor", "in shards"])
def test_a_full_model_is_what_peft_makes(tmp_path, make, form):
    base, options = tmp_path / "base", {}
    if form == "experts in one tensor":
        options["save_original_format"] = False
    if form == "in shards":
        options["max_shard_size"] = "8KB"
    make().save_pretrained(base, **options)
    a = adapter(tmp_path / "a", make, 1, base)
    b = adapter(tmp_path / "b", make, 2, base, target_parameters=BOTH[1:], target_modules=[])
    merge_adapters([a, b], weights=[0.7, 0.4], output=tmp_path / "out")
    seen = []
    merge_to_model([a, b], tmp_path / "model", weights=[0.7, 0.4],
                   progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    close(logits(full.eval()), logits(by_peft(tmp_path / "out", make())))
    files = {p.name for p in (tmp_path / "model").glob("*.safetensors")}
    assert files == {p.name for p in base.glob("*.safetensors")}
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("make", [MIXTURES["mixtral"], MIXTURES["gpt_oss"]])
def test_square_experts_lie_as_their_class_has_them(tmp_path, make):
    square = lambda: make(intermediate_size=WIDE // 2)  # noqa: E731
    square().save_pretrained(tmp_path / "base")
    a = adapter(tmp_path / "a", square, 1, tmp_path / "base")
    merge_to_model([a], tmp_path / "model", weights=1.0)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    close(logits(full.eval()), logits(by_peft(a, square())))


def test_a_full_model_of_other_experts_is_refused(tmp_path):
    make = MIXTURES["gpt_oss"]
    make(num_local_experts=EXPERTS + 1).save_pretrained(tmp_path / "base")
    a = adapter(tmp_path / "a", make, 1, tmp_path / "base")
    said = refusal("merge", a, "--save-as", "full", "-o", tmp_path / "model")
    assert "experts" in said
    assert not (tmp_path / "model").exists()
