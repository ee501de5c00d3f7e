"""A base spread over devices, or lying on the disk in part, gives the same statistics."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, T5Config, T5Model

from orthomerge.errors import AssetError
from orthomerge.models.loading import load_backbone
from orthomerge.statistics import collect_statistics

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "k", "v", "wo"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaModel(llama).save_pretrained(folder / "llama")
    T5Model(t5).save_pretrained(folder / "t5")
    return folder


def batches():
    ids = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:2], "attention_mask": mask[:2]},
    ]


@pytest.mark.parametrize(
    ("name", "device_map"),
    [
        ("llama", "auto"),
        ("llama", {"": "cpu"}),
        ("llama", {"embed_tokens": "cpu", "rotary_emb": "cpu", "layers.0": "cpu",
                   "layers.1": "disk", "norm": "cpu"}),
        ("llama", {"embed_tokens": "disk", "rotary_emb": "cpu", "layers.0": "disk",
                   "layers.1": "cpu", "norm": "disk"}),
        ("t5", {"shared": "cpu", "encoder.embed_tokens": "cpu", "encoder.block": "disk",
                "encoder.final_layer_norm": "cpu", "encoder.dropout": "cpu", "decoder": "cpu"}),
    ],
)  # fmt: skip
def test_where_the_weights_lie_changes_nothing(bases, name, device_map):
    plain = collect_statistics(load_backbone(str(bases / name)), batches(), TARGETS[name])
    model = load_backbone(str(bases / name), device_map=device_map)
    found = collect_statistics(model, batches(), TARGETS[name])
    assert found.layers == plain.layers
    assert found.meta == plain.meta
    for layer in plain.layers:
        torch.testing.assert_close(found.second_moment(layer), plain.second_moment(layer))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("device_map", ["nowhere", {"": "nowhere"}])
def test_a_device_that_does_not_exist_is_said(bases, device_map):
    with pytest.raises(AssetError, match="cannot be loaded") as caught:
        load_backbone(str(bases / "llama"), device_map=device_map)
    assert "\n" not in str(caught.value)
