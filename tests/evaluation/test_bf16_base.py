"""A frozen base in bfloat16: what it scores, trains and measures beside the same in float32."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call, make_base, printed, tiny_bert
from tiny_text import LLAMA_TARGETS, easy_task, save_tiny, tiny_language_tokenizer, tiny_llama

from orthomerge.adapters import new_lora, read_adapter, save_start
from orthomerge.errors import UnknownNameError
from orthomerge.evaluation.classification import applied
from orthomerge.factors import LoraFactors
from orthomerge.models.loading import in_precision, load_for
from orthomerge.statistics import Statistics


@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_a_small_update_is_not_rounded_away_and_leaves_no_trace(kind):
    """An update of a thousandth of the weights, which bfloat16 cannot hold beside them."""
    model = in_precision(tiny_llama(40), "bf16")
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    torch.manual_seed(0)
    factors = LoraFactors(torch.randn(2, 32), torch.randn(64, 2))
    small = LoraFactors(
        factors.A, factors.B * (1e-3 * layer.weight.norm() / factors.delta().norm())
    )
    x = torch.randn(5, 32).bfloat16()
    before = layer(x)
    with torch.no_grad(), applied(model, {name: small if kind == "factors" else small.delta()}):
        with_it = layer(x)
        alone = torch.nn.functional.linear(x.float(), small.delta())
    assert torch.equal(layer(x), before)
    rounded = (layer.weight + small.delta().to(layer.weight)).float() - layer.weight.float()
    lost = (rounded - small.delta()).norm() / small.delta().norm()
    assert lost > 0.3  # in the weights themselves it would be
    held: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, i, out: held.append(out.float()))
    layer(x)
    hook.remove()
    exact = held[0] + alone
    assert float((with_it.float() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("words", [False, True], ids=["classifier", "words"])
def test_training_and_scores_agree_with_float32(tmp_path, tiny_tokenizer, words):
    if words:
        base, kind, targets = save_tiny(tmp_path / "base"), "CAUSAL_LM", LLAMA_TARGETS
    else:
        base, kind, targets = tmp_path / "base", "SEQ_CLS", ["query", "value", "key", "dense"]
        make_base(base, tiny_tokenizer)
    torch.manual_seed(0)
    lora = new_lora(load_for(str(base), kind), targets=targets, rank=4, alpha=8, task_type=kind)
    save_start(lora, tmp_path / "start")
    rows = easy_task(tmp_path / "rows.jsonl", ("king", "queen"), 200)
    test = easy_task(tmp_path / "test.jsonl", ("king", "queen"), 100, seed=5)
    how = ("--template", "{text}\nAnswer:") if words else ()
    found = {}
    for precision in ("float32", "bf16"):
        out = tmp_path / precision
        said = printed("train", tmp_path / "start", "--train-file", rows, *how, "--epochs", 6,
                       "--learning-rate", 1e-2 if words else 5e-3, "--precision", precision,
                       "--base", base, "--output", out, "--json")  # fmt: skip
        found[precision] = json.loads(said)["loss"]
        adapter = read_adapter(out)
        for factors in adapter.layers.values():  # kept, and trained, in float32
            assert factors.A.dtype == factors.B.dtype == torch.float32
            assert not torch.equal(factors.B, factors.B.bfloat16().float())
        scores = [
            json.loads(printed("eval", out, "--test-file", test, "--base", base, "--precision", p,
                               "--json"))["metrics"]["accuracy"]
            for p in ("float32", "bf16")
        ]  # fmt: skip
        assert scores[0] == pytest.approx(scores[1], abs=0.05)
    assert found["bf16"]["first"] == pytest.approx(found["float32"]["first"], rel=0.02)


def test_statistics_agree_and_say_the_type(tmp_path, tiny_base):
    rows = easy_task(tmp_path / "rows.jsonl", ("king", "queen"), 60)
    read = []
    for precision in ("float32", "bf16"):
        file = tmp_path / f"{precision}.st"
        call("stats", tiny_base, "--data", rows, "--precision", precision, "--output", file)
        read.append(Statistics.load(file))
    assert [s.meta.dtype for s in read] == ["float32", "bfloat16"]
    for layer in read[0].layers:
        one, other = (s.second_moment(layer) for s in read)
        assert other.dtype == torch.float64
        assert float((one - other).norm() / one.norm()) < 0.02


def test_what_is_no_precision_is_said():
    with pytest.raises(UnknownNameError, match="precision"):
        in_precision(tiny_llama(len(tiny_language_tokenizer())), "fp8")
    assert next(in_precision(tiny_bert(), "float32").parameters()).dtype == torch.float32
