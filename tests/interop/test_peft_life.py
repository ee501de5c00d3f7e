"""A merged adapter in PEFT: loaded, trained on, unloaded into the base, swapped while it serves."""

from __future__ import annotations

import pytest
import torch
from conftest import call, make_texts
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from tiny_lora import lay_out, wrapped
from torch import nn

from orthomerge.adapters import read_adapter
from orthomerge.evaluation.classification import applied
from orthomerge.models.loading import load_language_model, load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    base, _ = lay_out(folder)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        model = wrapped(base)
        for weight in model.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight, std=0.2)
        model.save_pretrained(folder / name, save_embedding_layers=False)
    for name, (first, second) in {"ab": "ab", "bc": "bc"}.items():
        call(
            "merge",
            folder / first,
            folder / second,
            "--weights",
            1,
            "--base",
            base,
            "--output",
            folder / name,
        )
    return folder


def base_of(place):
    return load_language_model(str(place / "base"))


def batch(place):
    tokenizer = load_tokenizer(str(place / "base"))
    return dict(tokenizer(make_texts(6), padding=True, return_tensors="pt"))


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def expected(place, names, inputs):
    """The oracle: every adapter's update added to the base's weights."""
    model = base_of(place)
    alone = [read_adapter(place / n).layers for n in names]
    with applied(model, {n: sum(a[n].delta() for a in alone) for n in alone[0]}):
        return logits(model, inputs)


def test_it_loads_and_unloads_into_the_base(place, tmp_path):
    inputs = batch(place)
    model = PeftModel.from_pretrained(base_of(place), place / "ab")
    right = expected(place, "ab", inputs)
    torch.testing.assert_close(logits(model, inputs), right, atol=2e-4, rtol=1e-4)
    assert float((logits(base_of(place), inputs) - right).abs().max()) > 0.1
    whole = model.merge_and_unload()
    torch.testing.assert_close(logits(whole, inputs), right, atol=2e-4, rtol=1e-4)
    whole.save_pretrained(tmp_path / "whole")  # an ordinary model for vLLM, llama.cpp and the like
    again = load_language_model(str(tmp_path / "whole"))
    torch.testing.assert_close(logits(again, inputs), right, atol=2e-4, rtol=1e-4)


def test_its_training_goes_on_and_what_comes_out_merges_again(place, tmp_path):
    inputs = batch(place)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = PeftModel.from_pretrained(base_of(place), place / "ab", is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "more", save_embedding_layers=False)
    before, after = read_adapter(place / "ab").layers, read_adapter(tmp_path / "more").layers
    assert set(before) == set(after)
    assert all(float((before[n].B - after[n].B).norm()) > 0 for n in before)
    call("merge", tmp_path / "more", place / "c", "--weights", 1, "--base", place / "base",
         "--output", tmp_path / "merged")  # fmt: skip
    merged, other = read_adapter(tmp_path / "merged").layers, read_adapter(place / "c").layers
    for name in merged:
        right = after[name].delta() + other[name].delta()
        torch.testing.assert_close(merged[name].delta(), right, atol=1e-5, rtol=1e-4)


def test_it_is_swapped_in_while_a_model_serves(place):
    inputs = batch(place)
    model = PeftModel.from_pretrained(base_of(place), place / "ab")
    held = [p for n, p in model.named_parameters() if "lora_A" in n]
    hotswap_adapter(model, str(place / "bc"), adapter_name="default")
    right = expected(place, "bc", inputs)
    torch.testing.assert_close(logits(model, inputs), right, atol=2e-4, rtol=1e-4)
    assert all(p is q for p, q in zip(held, [p for n, p in model.named_parameters()
                                             if "lora_A" in n], strict=True))  # fmt: skip


def test_two_merges_beside_each_other_on_one_base(place):
    inputs = batch(place)
    model = PeftModel.from_pretrained(base_of(place), place / "ab", adapter_name="ab")
    model.load_adapter(str(place / "bc"), adapter_name="bc")
    for name in ("ab", "bc", "ab"):
        model.set_adapter(name)
        right = expected(place, name, inputs)
        torch.testing.assert_close(logits(model, inputs), right, atol=2e-4, rtol=1e-4)
