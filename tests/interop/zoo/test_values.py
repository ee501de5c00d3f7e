"""Values that are not finite, tensors without an entry: refused by every verb that reads them."""

from __future__ import annotations

import pytest
import torch
from odd_adapters import WEIGHTS, llama, refusal, saved
from safetensors.torch import load_file, save_file

import orthomerge
from orthomerge.adapters import Adapter
from orthomerge.adapters.initialise import load_trainable
from orthomerge.diagnostics import diagnose
from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors

BATCH = {"input_ids": torch.arange(48).reshape(4, 12) % 35 + 5, "attention_mask": torch.ones(4, 12)}


@pytest.fixture
def two(tmp_path):
    return [saved(tmp_path / n, llama, i, target_modules=["q_proj"]) for i, n in enumerate("ab")]


@pytest.fixture
def headed(tmp_path):
    return [
        saved(tmp_path / n, llama, i, target_modules=["q_proj"], modules_to_save=["lm_head"])
        for i, n in enumerate("ab")
    ]


def spoil(folder, word, change):
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k in tensors if word in k)
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / WEIGHTS)
    return key


def one(value):
    def change(tensor):
        tensor.flatten()[-1] = value
        return tensor

    return change


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    found = orthomerge.collect_statistics(llama(), [BATCH], ["q_proj"])
    return found.save(tmp_path_factory.mktemp("s") / "s.stats.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_verb_refuses_factors_that_are_not_finite(tmp_path, two, stats, value):
    spoil(two[1], "lora_A", one(value))
    out = tmp_path / "out"
    for arguments in (
        ("merge", *two, "-o", out),
        ("merge", *two, "--method", "ties", "-o", out),
        ("diagnose", *two),
        ("diagnose", *two, "--stats", stats, "--stats", stats),
        ("convert", *two, "--stats", stats, "--stats", stats, "-o", out),
        ("merge", *two, "--tune", "statistics", "--stats", stats, "--stats", stats, "-o", out),
    ):
        said = refusal(*arguments)
        assert all(word in said for word in ("not finite", str(two[1]), "q_proj")), said
        assert not out.exists()
    with pytest.raises(AdapterError, match="not finite"):
        load_trainable(llama(), two[1])


def test_adapters_in_memory_are_held_to_it_too():
    good = LoraFactors(torch.ones(2, 4), torch.ones(4, 2))
    bad = LoraFactors(torch.ones(2, 4), torch.full((4, 2), float("nan")))
    with pytest.raises(AdapterError, match=r"layer 'x' of 'b' has values that are not finite"):
        diagnose([Adapter("a", {"x": good}), Adapter("b", {"x": bad})])


def test_lora_biases_that_are_not_finite(tmp_path):
    folder = saved(tmp_path / "a", lambda: llama(attention_bias=True), 1,
                   target_modules=["q_proj"], lora_bias=True)  # fmt: skip
    spoil(folder, "lora_B.bias", one(float("nan")))
    said = refusal("merge", folder, "-o", tmp_path / "out")
    assert all(word in said for word in ("the bias of layer", "not finite", str(folder)))


@pytest.mark.parametrize("heads", ["keep", "average"])
@pytest.mark.parametrize(
    ("change", "word"),
    [(one(float("nan")), "not finite"), (lambda _: torch.empty(0), "ZeRO-3"),
     (lambda _: torch.empty(0, 16), "ZeRO-3")],
)  # fmt: skip
def test_whole_modules_are_checked(tmp_path, headed, heads, change, word):
    key = spoil(headed[1], "lm_head", change)
    said = refusal("merge", *headed, "--heads", heads, "-o", tmp_path / "out")
    assert all(w in said for w in (word, str(headed[1]), key.removeprefix("base_model.model.")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 16)])
def test_factors_that_zero_3_left_empty(tmp_path, two, shape):
    spoil(two[0], "lora_A", lambda _: torch.empty(shape))
    said = refusal("merge", *two, "-o", tmp_path / "out")
    assert all(word in said for word in ("ZeRO-3", "without an entry", str(two[0]), "q_proj"))
