"""Adapters of a model in memory, merged into a new one of it: held to PEFT and to the folders."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from peft_oracle import bert, gpt2, llama, loaded, outputs, save_adapter

from orthomerge import merge_loaded_adapters
from orthomerge.adapters import merge_adapters, read_adapter, read_loaded
from orthomerge.errors import OrthomergeError

QV = {"target_modules": ["query", "value"]}
KINDS = {
    "plain": (bert, QV, {"target_modules": ["query", "key"], "r": 2}),
    "patterns and rsLoRA": (
        bert,
        QV | {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}, "use_rslora": True},
        QV,
    ),
    "biases": (llama, *[{"target_modules": ["q_proj"], "lora_bias": True}] * 2),
    "embeddings": (llama, *[{"target_modules": ["embed_tokens", "q_proj"]}] * 2),
    "Conv1D": (gpt2, *[{"target_modules": ["c_attn"], "fan_in_fan_out": True}] * 2),
    "DoRA": (llama, *[{"target_modules": ["q_proj", "v_proj"], "use_dora": True}] * 2),
    "DoRA of Conv1D": (
        gpt2,
        *[{"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}] * 2,
    ),
    "whole modules": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ),
}


def together(tmp_path, base, first, second):
    """A model with the adapters "a" and "b", and the folders they are from."""
    named = str(tmp_path / "base")
    base().save_pretrained(named)
    folders = [
        save_adapter(tmp_path / name, base, seed, base_name=named, **config)
        for seed, (name, config) in enumerate((("a", first), ("b", second)))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base(), folders[0], adapter_name="a").eval()
        model.load_adapter(folders[1], "b")
    return model, folders


def under(model, name):
    model.set_adapter(name)
    return outputs(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_adapter_is_what_merging_the_folders_gives(tmp_path, kind):
    base, *configs = KINDS[kind]
    model, folders = together(tmp_path, base, *configs)
    merge_loaded_adapters(model, ["a", "b"], "merged", weights=[0.7, -0.4])
    heads = "average" if kind == "whole modules" else "keep"
    merge_adapters(folders, weights=[0.7, -0.4], heads=heads, output=tmp_path / "out")
    expected = outputs(loaded(tmp_path / "out", base))
    torch.testing.assert_close(under(model, "merged"), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(under(model, "a"), expected, atol=2e-4)


def test_the_exact_sum_is_peft_s_own_cat(tmp_path):
    model, _ = together(tmp_path, bert, QV, QV)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "theirs", combination_type="cat")
    merge_loaded_adapters(model, ["a", "b"], "ours", method="cat", weights=[0.7, 0.4])
    ours, theirs = under(model, "ours"), under(model, "theirs")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{"density": 0.5}, {"density": 0.5, "rank": "full"}, {"rank": 3}])
def test_a_dense_method_is_cut_as_for_a_folder(tmp_path, how):
    model, folders = together(tmp_path, bert, QV, QV)
    found = merge_loaded_adapters(model, ["a", "b"], "merged", method="ties", **how)
    expected = merge_adapters(folders, method="ties", **how)
    assert found.truncation_error == pytest.approx(expected.truncation_error, rel=1e-3)
    read = read_loaded(model, "merged")
    for layer in expected.layers:
        torch.testing.assert_close(
            read.layers[layer].delta(), expected.dense(layer), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_model_is_read_as_its_folder_is(tmp_path, kind):
    base, *configs = KINDS[kind]
    model, folders = together(tmp_path, base, *configs)
    for name, folder in zip("ab", folders, strict=True):
        live, stored = read_loaded(model, name), read_adapter(folder)
        assert set(live.layers) == set(stored.layers)
        for layer, factors in stored.layers.items():
            torch.testing.assert_close(
                live.layers[layer].delta(), factors.delta(), atol=1e-5, rtol=1e-4
            )
        assert set(live.modules) == set(stored.modules)
        assert set(live.biases) == set(stored.biases)
        assert live.embeddings == stored.embeddings


def test_the_rest_of_the_model_stays_as_it_was(tmp_path):
    model, _ = together(tmp_path, bert, QV, QV)
    before = {name: under(model, name) for name in "ab"}
    model.set_adapter("a")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_base_model().bert.encoder.layer[0].attention.self.query.lora_A["a"].requires_grad_()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    merge_loaded_adapters(model, ["a", "b"], "merged")
    assert model.active_adapter == "a"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    for name, expected in before.items():
        assert torch.equal(under(model, name), expected)
    merge_loaded_adapters(model, ["merged", "a"], "more")  # and it can be merged again
    model.save_pretrained(tmp_path / "saved", selected_adapters=["merged"])
    again = loaded(tmp_path / "saved" / "merged", bert)
    torch.testing.assert_close(outputs(again), under(model, "merged"))


def test_heads_are_averaged_or_the_only_one_is_kept_and_two_are_refused(tmp_path):
    headed = QV | {"task_type": "SEQ_CLS"}
    model, folders = together(tmp_path, bert, headed, headed)
    with pytest.raises(OrthomergeError, match="'a', 'b' have heads of their own"):
        merge_loaded_adapters(model, ["a", "b"], "merged")
    with pytest.raises(OrthomergeError, match="carries 'classifier"):
        merge_loaded_adapters(model, ["a", "b"], "merged", heads="refuse")
    assert set(model.peft_config) == {"a", "b"}
    merge_loaded_adapters(model, ["a", "b"], "merged", heads="average")
    merge_adapters(folders, heads="average", output=tmp_path / "out")
    expected = outputs(loaded(tmp_path / "out", bert))
    torch.testing.assert_close(under(model, "merged"), expected, atol=1e-5, rtol=1e-5)
    merge_loaded_adapters(model, ["a", "a"], "twice", weights=0.5)
    torch.testing.assert_close(under(model, "twice"), under(model, "a"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((["a", "c"], "new", {}), "unknown adapter 'c' in the model"),
        ((["a"], "b", {}), "has an adapter 'b' already"),
        ((["a"], "my.new", {}), "without a dot"),
        (([], "new", {}), "nothing to merge"),
        ((["a", "b"], "new", {"weights": [1, 1, 1]}), "3 weights for 2 adapters"),
        ((["a", "b"], "new", {"method": "emr"}), "one update per task"),
        ((["a", "b"], "new", {"method": "fisher"}), "needs Fisher information"),
        ((["a", "b"], "new", {"densty": 1}), "unknown option 'densty'"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_leaves_the_model_alone(tmp_path, asked, message):
    model, _ = together(tmp_path, bert, QV, QV)
    adapters, name, how = asked
    with pytest.raises(OrthomergeError, match=message):
        merge_loaded_adapters(model, adapters, name, **how)
    assert set(model.peft_config) == {"a", "b"}
    assert not [n for n, _ in model.named_parameters() if ".new." in n]
