"""Every kind of LoRA adapter against PEFT: a merge acts as the sum of what PEFT makes of each."""

from __future__ import annotations

import json

import pytest
import torch
from peft_oracle import bert, gpt2, llama, loaded, outputs, save_adapter, summed, weights
from safetensors.torch import load_file, save_file

from orthomerge.adapters import merge_adapters, read_adapter
from orthomerge.errors import AdapterError

MIXED = [
    {
        "target_modules": ["query", "key"],
        "rank_pattern": {"query": 2, r"layer\.0\..*\.key": 3},
        "alpha_pattern": {r"^bert\.encoder\.layer\.1\.attention\.self\.key": 3},
    },
    {"target_modules": ["key", "attention.output.dense"], "r": 3, "use_rslora": True},
    {"target_modules": r".*layer\.0.*\.dense", "r": 5, "lora_alpha": 1},
]
BIASED = [
    {"target_modules": ["query", "value"], "lora_bias": True, "use_rslora": True},
    {"target_modules": ["value"], "r": 2},
]
EMBEDDED = [
    {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "r": 3},
    {"target_modules": ["embed_tokens"], "r": 2, "use_rslora": True},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
]
CONV1D = [
    {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    {"target_modules": ["attn.c_proj"], "r": 2},
]
DORA_LLAMA = [
    {"target_modules": ["q_proj", "up_proj", "down_proj", "embed_tokens"], "use_dora": True},
    {"target_modules": ["q_proj"], "r": 2},
]
DORA_GPT2 = [
    {"target_modules": ["c_attn", "c_fc", "attn.c_proj"], "use_dora": True, "fan_in_fan_out": True},
    {"target_modules": ["c_attn"], "use_dora": True, "use_rslora": True},
]


@pytest.mark.parametrize(
    ("base", "configs"),
    [
        pytest.param(bert, MIXED, id="mixed ranks and targets"),
        pytest.param(bert, BIASED, id="lora_bias"),
        pytest.param(llama, EMBEDDED, id="embeddings"),
        pytest.param(gpt2, CONV1D, id="conv1d"),
        pytest.param(llama, DORA_LLAMA, id="dora"),
        pytest.param(gpt2, DORA_GPT2, id="dora of conv1d"),
    ],
)
def test_a_merge_acts_in_peft_as_the_sum_of_what_peft_does(tmp_path, base, configs):
    base().save_pretrained(tmp_path / "base")
    folders = [
        save_adapter(tmp_path / str(i), base, i, base_name=str(tmp_path / "base"), **config)
        for i, config in enumerate(configs)
    ]
    factors = [1.0, -0.5, 0.25][: len(folders)]
    merge_adapters(folders, weights=factors, output=tmp_path / "out")
    expected = summed(folders, factors, base)
    for name, value in weights(tmp_path / "out", base).items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5, msg=name)
    model = base()
    model.load_state_dict({k: v.float() for k, v in expected.items()})
    torch.testing.assert_close(
        outputs(loaded(tmp_path / "out", base)), outputs(model), atol=2e-5, rtol=1e-4
    )


def test_the_merged_adapter_adapts_the_layers_of_its_inputs_and_no_others(tmp_path):
    for i, config in enumerate(MIXED):
        save_adapter(tmp_path / str(i), bert, i, **config)
    merged = merge_adapters([tmp_path / str(i) for i in range(3)], output=tmp_path / "out")
    wrapped = loaded(tmp_path / "out", bert).base_model.model
    adapted = {n for n, m in wrapped.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    assert adapted == set(merged.layers)
    assert len(adapted) == 2 + 2 + 2 + 2  # query, key, attention.output.dense, two more in layer 0


def test_factors_are_read_when_asked_for_and_none_is_kept(tmp_path, monkeypatch):
    import orthomerge.adapters.files as files

    save_adapter(tmp_path / "a", bert, 1, target_modules=["query"])
    asked = []
    original = files.read_tensor
    monkeypatch.setattr(files, "read_tensor", lambda s: asked.append(s) or original(s))
    adapter = read_adapter(tmp_path / "a")
    assert adapter.shapes == dict.fromkeys(adapter.layers, (32, 32))
    assert "other" not in adapter.layers
    assert adapter.layers.get("other") is None
    assert asked == []
    layer = next(iter(adapter.layers))
    adapter.layers[layer]
    adapter.layers[layer]
    assert len(asked) == 4


def edited(folder, change, **config):
    """The adapter with its tensors and its configuration changed."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return folder


def _key(tensors, word):
    return next(k for k in tensors if word in k)


def _widen(tensors):
    key = _key(tensors, "lora_B")
    tensors[key] = torch.zeros(32, 5)


def _conv(tensors):
    key = _key(tensors, "lora_A")
    tensors[key] = tensors[key][:, :, None, None].clone()


def _nothing(tensors):
    pass


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda t: t.pop(_key(t, "lora_A")), {}, ["no lora_A", "it was cut"]),
        (_widen, {}, ["A [4, 32] and B [32, 5]", "rank 4"]),
        (_conv, {}, ["only linear, convolutional and embedding"]),
        (_nothing, {"r": 8}, ["rank 8"]),
        (_nothing, {"peft_type": "IA3"}, ["IA3", "only LoRA"]),
        (_nothing, {"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "changes the base"]),
        (_nothing, {"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        (_nothing, {"target_parameters": ["query.w"]}, ["target_parameters"]),
        (_nothing, {"use_dora": True, "base_model_name_or_path": ""}, ["do not agree on use_dora"]),
        (lambda t: t.update({"base_model.model.q.bias": torch.ones(2)}), {"bias": "all"},
         ["the base's own biases", "lora_bias=True"]),
        (lambda t: t.update({_key(t, "lora_A"): t[_key(t, "lora_A")].to(torch.int8)}), {},
         ["type I8", "only floating-point"]),
        (lambda t: t.update({"base_model.model.x.lora_C": torch.ones(2)}), {}, ["no factor"]),
    ],
)  # fmt: skip
def test_what_is_no_plain_update_is_refused(tmp_path, change, config, words):
    folder = save_adapter(tmp_path / "a", bert, 1, target_modules=["query"])
    edited(folder, change, **config)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    for word in [*words, str(folder)]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dora_asks_for_its_base_and_knows_a_wrong_one(tmp_path):
    folder = save_adapter(tmp_path / "a", llama, 1, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(AdapterError, match="--base"):
        merge_adapters([folder], output=tmp_path / "out")
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(AdapterError, match="no model of its base"):
        merge_adapters([folder], base=str(tmp_path / "bert"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    llama().save_pretrained(tmp_path / "llama")
    merge_adapters([folder], base=str(tmp_path / "llama"), output=tmp_path / "out")
    expected = weights(folder, llama)
    for name, value in weights(tmp_path / "out", llama).items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5)


def test_dora_finds_its_layer_in_a_base_saved_without_a_head_and_in_shards(tmp_path):
    folder = save_adapter(tmp_path / "a", bert, 1, target_modules=["query"], use_dora=True)
    bert().bert.save_pretrained(tmp_path / "backbone", max_shard_size="20KB")
    assert len(list((tmp_path / "backbone").glob("*.safetensors"))) > 1
    merge_adapters([folder], base=str(tmp_path / "backbone"), rank=6, output=tmp_path / "out")
    read = read_adapter(tmp_path / "out")
    assert {f.rank for f in read.layers.values()} == {6}
    errors = json.loads((tmp_path / "out" / "merge.json").read_text())["truncation_error"]
    plain, full = bert().state_dict(), weights(folder, bert)
    for name, factors in read.layers.items():
        delta = full[f"{name}.weight"] - plain[f"{name}.weight"]
        lost = float((factors.delta() - delta).norm() / delta.norm())
        assert errors[name] == pytest.approx(lost, rel=1e-3)


def test_lora_bias_beside_embeddings_is_refused(tmp_path):
    a = save_adapter(tmp_path / "a", llama, 1, target_modules=["embed_tokens"])
    b = save_adapter(tmp_path / "b", llama, 2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match="PEFT cannot have"):
        merge_adapters([a, b], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layer_weights_hold_for_biases_too(tmp_path):
    folder = save_adapter(
        tmp_path / "a", bert, 1, target_modules=["query", "value"], lora_bias=True
    )
    merge_adapters([folder], layer_weights={"query": 0.0, r"layer\.1\.": -2.0},
                   output=tmp_path / "out")  # fmt: skip
    before, after = read_adapter(folder), read_adapter(tmp_path / "out")
    for name, bias in before.biases.items():
        weight = 0.0 if "query" in name else -2.0 if "layer.1." in name else 1.0
        torch.testing.assert_close(after.biases[name], weight * bias)
        torch.testing.assert_close(after.layers[name].delta(), weight * before.layers[name].delta())
