"""One layer under two names: with and without a head, of Transformers 4 and 5, behind wrappers."""

from __future__ import annotations

import warnings

import pytest
import torch
from odd_adapters import (
    IDS,
    by_peft,
    close,
    configured,
    llama,
    logits,
    refusal,
    rewritten,
    saved,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from orthomerge.adapters import merge_adapters, merge_to_model, read_adapter
from orthomerge.diagnostics import diagnose
from orthomerge.errors import AdapterError, OrthomergeWarning

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


HEADED = {
    "bert": (bert, AutoModelForSequenceClassification, ["query", "dense"]),
    "llama": (llama, AutoModelForCausalLM, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, AutoModelForCausalLM, ["c_attn", "c_proj"]),
}


def half(state, other, weights):
    """The base's weights with two models' changes, in float64."""
    return {
        k: v.double()
        + sum(w * (o[k].double() - v.double()) for o, w in zip(other, weights, strict=True))
        for k, v in state.items()
    }


@pytest.fixture(params=list(HEADED))
def mixed(request, tmp_path):
    """A base folder, an adapter of the bare model, one of the model with a head, and the truth."""
    make, auto, targets = HEADED[request.param]
    base = tmp_path / "base"
    make().save_pretrained(base)
    bare = lambda: AutoModel.from_pretrained(base)  # noqa: E731
    whole = lambda: auto.from_pretrained(base)  # noqa: E731
    a = saved(tmp_path / "a", bare, 1, base=base, target_modules=targets)
    b = saved(tmp_path / "b", whole, 2, base=base, target_modules=targets)
    model = whole().eval()
    setattr(model, model.base_model_prefix, by_peft(a, bare()).merge_and_unload())
    changed = [model.state_dict(), by_peft(b, whole()).merge_and_unload().state_dict()]
    expected = whole().eval()
    truth = half(whole().state_dict(), changed, [0.7, 0.4])
    expected.load_state_dict({k: v.float() for k, v in truth.items()})
    return base, [a, b], whole, expected


def test_adapters_of_the_bare_and_of_the_whole_model_are_of_the_same_layers(mixed, tmp_path):
    _, folders, whole, expected = mixed
    for order, weights in ((folders, [0.7, 0.4]), (folders[::-1], [0.4, 0.7])):
        out = tmp_path / f"out-{order[0].name}"
        merged = merge_adapters(order, weights=weights, output=out)
        assert len(merged.layers) <= len(read_adapter(folders[1]).layers)
        close(logits(by_peft(out, whole())), logits(expected))
        model = tmp_path / f"model-{order[0].name}"
        merge_to_model(order, model, weights=weights)
        auto = type(expected)
        close(logits(auto.from_pretrained(model).eval()), logits(expected))


def test_adapters_of_the_bare_model_alone_stay_so(mixed, tmp_path):
    base, (a, _), _, _ = mixed
    merge_adapters([a], weights=1.0, output=tmp_path / "out")
    assert set(read_adapter(tmp_path / "out").layers) == set(read_adapter(a).layers)
    bare = [AutoModel.from_pretrained(base) for _ in "12"]
    close(logits(by_peft(tmp_path / "out", bare[0])), logits(by_peft(a, bare[1])))


def test_diagnose_takes_them_for_the_same_layers(mixed):
    _, folders, _, _ = mixed
    assert len(diagnose(folders).overlap.layers) <= len(read_adapter(folders[1]).layers)


def test_where_the_base_cannot_be_looked_at_a_prefix_is_asked_about(mixed, tmp_path):
    base, folders, whole, expected = mixed
    for folder in folders:
        configured(folder, base_model_name_or_path="org/elsewhere")
    said = refusal("merge", *folders, "-o", tmp_path / "out")
    assert all(w in said for w in (str(folders[0]), str(folders[1]), "may be the same", "--base"))
    merge_adapters(folders, weights=[0.7, 0.4], base=str(base), output=tmp_path / "out")
    close(logits(by_peft(tmp_path / "out", whole())), logits(expected))


def test_an_encoder_decoder_has_one_name_for_its_layers(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    T5ForConditionalGeneration(T5Config(**sizes, num_heads=2)).save_pretrained(tmp_path / "base")
    load = T5ForConditionalGeneration.from_pretrained
    a = saved(tmp_path / "a", lambda: load(tmp_path / "base"), 1, base=tmp_path / "base",
              target_modules=["q", "v"])  # fmt: skip
    merge_adapters([a], weights=1.0, output=tmp_path / "out")
    ids = {"input_ids": IDS, "decoder_input_ids": IDS}
    ours, theirs = (by_peft(f, load(tmp_path / "base")) for f in (tmp_path / "out", a))
    close(logits(ours, **ids), logits(theirs, **ids))


# ---------------------------------------------------------------------------------------------
# Vision-language models

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def llava(**changes):
    torch.manual_seed(0)
    text = LlamaConfig(**SIZES, num_key_value_heads=1)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=39, **changes
    )
    return LlavaForConditionalGeneration(config).eval()


def gemma3():
    torch.manual_seed(0)
    text = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
    config = Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**VISION).to_dict(),
        mm_tokens_per_image=1, image_token_index=39,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def qwen2_vl():
    torch.manual_seed(0)
    text = {
        **SIZES, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4,
              "mlp_ratio": 2}  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=39, video_token_id=38,
        vision_start_token_id=37, vision_end_token_id=36,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).eval()


def of_llava(key: str) -> str:
    """The key that Transformers 4 had for LLaVA and Gemma 3."""
    key = key.replace("model.model.language_model.", "model.language_model.model.")
    for name in ("vision_tower", "multi_modal_projector"):
        key = key.replace(f"model.model.{name}", f"model.{name}")
    return key.replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")


def of_qwen(key: str) -> str:
    key = key.replace("model.model.language_model.", "model.model.")
    return key.replace("model.model.visual", "model.visual")


PICTURES = {
    "llava": (llava, of_llava),
    "gemma3": (gemma3, of_llava),
    "qwen2_vl": (qwen2_vl, of_qwen),
}
TARGETS = ["q_proj", "down_proj", "lm_head", "fc1"]


@pytest.fixture(params=list(PICTURES))
def seen(request, tmp_path):
    """A base folder, one adapter under both generations' names, and a second one."""
    make, older = PICTURES[request.param]
    base = tmp_path / "base"
    make().save_pretrained(base)
    load = lambda: AutoModelForImageTextToText.from_pretrained(base).eval()  # noqa: E731
    new, old = (
        saved(tmp_path / name, load, 1, base=base, target_modules=TARGETS) for name in ("v5", "v4")
    )
    rewritten(old, older)
    assert set(read_adapter(old).layers) != set(read_adapter(new).layers)
    other = saved(tmp_path / "other", load, 2, base=base, target_modules=TARGETS)
    return base, new, old, other, load


def test_names_of_transformers_4_and_5_are_one(seen, tmp_path):
    _, new, old, other, load = seen
    for first, folder in (("v5", new), ("v4", old)):
        merge_adapters([folder, other], weights=[0.7, 0.4], output=tmp_path / f"out-{first}")
    both, again = (read_adapter(tmp_path / f"out-{n}") for n in ("v5", "v4"))
    assert set(both.layers) == set(again.layers) == set(read_adapter(new).layers)
    for name, factors in both.layers.items():
        torch.testing.assert_close(factors.delta(), again.layers[name].delta())
    merge_adapters([old], weights=1.0, output=tmp_path / "alone")
    close(logits(by_peft(tmp_path / "alone", load())), logits(by_peft(new, load())))


@pytest.mark.parametrize("generation", ["v5", "v4"])
def test_a_full_model_of_either_generation_is_what_peft_makes(seen, tmp_path, generation):
    _, new, old, _, load = seen
    folder = new if generation == "v5" else old
    merge_to_model([folder], tmp_path / "model", weights=1.0)
    ours, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs = by_peft(new, load())
    close(logits(ours.eval()), logits(theirs))
    tied = load().config.tie_word_embeddings  # PEFT merges the head's update into the embeddings
    state = ours.state_dict()
    for key, value in theirs.merge_and_unload().state_dict().items():
        if not (tied and key.endswith(("embed_tokens.weight", "lm_head.weight"))):
            torch.testing.assert_close(state[key], value, atol=1e-6, rtol=1e-5, msg=key)


# ---------------------------------------------------------------------------------------------
# Layers that are not there, and adapters that have nothing in common


def test_a_layer_that_the_base_does_not_have_is_an_error(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    a = saved(tmp_path / "a", llama, 1, base=tmp_path / "base", target_modules=["q_proj"])
    rewritten(a, lambda key: key.replace("self_attn", "attn"))
    for verb in ("merge", "diagnose"):
        said = refusal(verb, a, *(("-o", tmp_path / "out") if verb == "merge" else ()))
        for word in (str(a), "layers.0.attn.q_proj", "no model of its base", "self_attn", "--base"):
            assert word in said
    assert not (tmp_path / "out").exists()


def test_wrong_depth_is_a_layer_that_is_not_there(tmp_path):
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    a = saved(tmp_path / "a", llama, 1, base=tmp_path / "base", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"'model\.layers\.1\.self_attn\.q_proj'"):
        merge_adapters([a], output=tmp_path / "out")


def test_a_module_named_module_is_a_wrapper_where_the_base_has_none(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    a, b = (
        saved(tmp_path / n, llama, 1, base=tmp_path / "base", target_modules=["q_proj"])
        for n in "ab"
    )
    rewritten(b, lambda key: key.replace("base_model.model.", "base_model.model.module.", 1))
    merge_adapters([b], weights=1.0, output=tmp_path / "out")
    close(logits(by_peft(tmp_path / "out", llama())), logits(by_peft(a, llama())))


def test_adapters_that_share_no_layer_are_a_warning(tmp_path):
    a, b = (
        saved(tmp_path / str(n), llama, n, target_modules=["q_proj"], layers_to_transform=[n])
        for n in (0, 1)
    )
    with pytest.warns(OrthomergeWarning, match="share no layer"):
        merge_adapters([a, b], weights=1.0, output=tmp_path / "out")
    c = saved(tmp_path / "c", llama, 3, target_modules=["v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", OrthomergeWarning)
        merge_adapters([a, c], weights=1.0, output=tmp_path / "other")
        merge_adapters([a, a], weights=1.0, output=tmp_path / "same")


def test_the_warning_is_one_line_of_the_command(tmp_path):
    import subprocess
    import sys

    a, b = (
        saved(tmp_path / str(n), llama, n, target_modules=["q_proj"], layers_to_transform=[n])
        for n in (0, 1)
    )
    command = [sys.executable, "-m", "orthomerge", "merge", a, b, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [x for x in done.stderr.splitlines() if "share no layer" in x]
    assert line.startswith("warning: ")


def test_a_base_saved_without_its_head_gives_the_names_of_the_adapters(tmp_path):
    bert().bert.save_pretrained(tmp_path / "base")
    a = saved(tmp_path / "a", bert, 1, base=tmp_path / "base", target_modules=["query"])
    b = saved(tmp_path / "b", lambda: bert().bert, 2, base=tmp_path / "base",
              target_modules=["query"])  # fmt: skip
    for folders in ([a], [a, b], [b, a]):
        out = tmp_path / f"out-{folders[0].name}{len(folders)}"
        merged = merge_adapters(folders, weights=1.0, output=out)
        assert set(merged.layers) == set(read_adapter(a).layers)
        by_peft(out, bert())
