"""Adapters of single experts, as in Transformers 4, on models that keep experts together."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
from odd_adapters import by_peft, close, configured, llama, logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from orthomerge.adapters import merge_adapters, merge_to_model, read_adapter

LAYERS, EXPERTS, WIDE, INSIDE = 2, 3, 16, 24
ANY = r"block_sparse_moe\.experts\.\d+\.w{}"


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=WIDE, intermediate_size=INSIDE, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDE, INSIDE), nn.Linear(WIDE, INSIDE)
        self.w2 = nn.Linear(INSIDE, WIDE)


def of_old():
    """The names that Mixtral's experts and its attention had in Transformers 4, for PEFT."""
    model, layers = nn.Module(), []
    for _ in range(LAYERS):
        layer, layer.block_sparse_moe = nn.Module(), nn.Module()
        layer.block_sparse_moe.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        layer.self_attn = nn.Module()
        layer.self_attn.q_proj = nn.Linear(WIDE, WIDE)
        layers.append(layer)
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(layers)
    return model


def made(folder, base, seed, **config):
    targets = ["w1", "w2", "w3", "q_proj"]
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "target_modules": targets}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(of_old(), LoraConfig(**options | config))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, 0, 0.3)
        wrapped.save_pretrained(folder)
    return configured(folder, base_model_name_or_path=str(base))


@pytest.mark.parametrize(
    "pattern",
    [{}, {"experts.1.w1": 3}, {r"layers.0\..*\.experts.0.w[123]": 1, "q_proj": 4}],
    ids=["equal", "one other", "a layer's expert and attention"],
)
def test_experts_of_different_ranks_are_read_by_peft(tmp_path, pattern):
    base = tmp_path / "base"
    mixtral().save_pretrained(base)
    load = lambda: AutoModelForCausalLM.from_pretrained(base).eval()  # noqa: E731
    a = made(tmp_path / "a", base, 1, rank_pattern=pattern)
    b = made(tmp_path / "b", base, 2)
    merged = merge_adapters([a, b], weights=[0.7, 0.4], output=tmp_path / "out")
    # The layers are those sums, also where rows of zeros were added.
    read = [read_adapter(f) for f in (a, b)]
    for name, factors in merged.layers.items():
        expected = 0.7 * read[0].layers[name].delta() + 0.4 * read[1].layers[name].delta()
        torch.testing.assert_close(factors.delta(), expected, atol=1e-5, rtol=1e-4)
    # PEFT on experts of Transformers 4 and on those of 5, and the full model, give one answer.
    assert PeftModel.from_pretrained(of_old(), tmp_path / "out")
    merge_to_model([a, b], tmp_path / "model", weights=[0.7, 0.4])
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    if find_spec("peft.utils.transformers_weight_conversion"):  # older ones read no experts there
        close(logits(by_peft(tmp_path / "out", load())), logits(full))
    assert not torch.allclose(logits(full), logits(load()), atol=1e-2)


def test_layers_that_are_no_experts_keep_their_ranks(tmp_path):
    from odd_adapters import saved

    a = saved(tmp_path / "a", llama, 1, target_modules=["q_proj", "v_proj"],
              rank_pattern={"q_proj": 5})  # fmt: skip
    out = merge_adapters([a], weights=1.0, output=tmp_path / "out")
    assert {f.rank for f in out.layers.values()} == {3, 5}
