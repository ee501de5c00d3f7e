"""Full models against PEFT's `merge_and_unload` of the same adapters; what is not written."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from orthomerge.adapters import read_adapter
from orthomerge.adapters.full_model import save_full_model
from orthomerge.errors import AdapterError, MergeError
from orthomerge.factors import LoraFactors
from orthomerge.merging import plan_merge
from orthomerge.records import seal

WEIGHTS = [0.7, 0.4]
IDS = torch.arange(24).reshape(2, 12) % 40


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ).eval()


CASES = {  # the model, the class it is loaded with, the layers that are adapted
    "bert": (tiny_bert, AutoModelForSequenceClassification, ["query", "value", "dense"]),
    "llama": (llama, AutoModelForCausalLM, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
    "gpt2": (gpt2, AutoModelForCausalLM, ["c_attn", "c_proj", "c_fc"]),
}


def adapter(model, folder, targets, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    return folder


def oracle(auto, base, adapters, weights=WEIGHTS):
    """The same adapters summed exactly by PEFT and merged into the base."""
    model = PeftModel.from_pretrained(auto.from_pretrained(base), adapters[0], adapter_name="0")
    for number, path in enumerate(adapters[1:], start=1):
        model.load_adapter(path, adapter_name=str(number))
    names = [str(n) for n in range(len(adapters))]
    model.base_model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.merge_and_unload().eval()


def merge(output, base, adapters, **options):
    plan = plan_merge([read_adapter(a).layers for a in adapters], weights=WEIGHTS)
    update_of = options.pop("update_of", lambda name: plan.merge(name).update)
    return save_full_model(output, base, update_of, names=plan.names, **options)


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """A base model in tiny shards and two adapters of it."""
    folder = tmp_path_factory.mktemp(request.param)
    make, auto, targets = CASES[request.param]
    make().save_pretrained(folder / "base", max_shard_size="12KB")
    assert (folder / "base" / "model.safetensors.index.json").is_file()
    paths = [adapter(make(), folder / f"a{n}", targets, seed=n) for n in range(2)]
    return auto, folder / "base", paths


@pytest.fixture
def small(tmp_path):
    """One small causal model in one file, and an adapter of it."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base", [adapter(llama(), tmp_path / "a", ["q_proj", "o_proj"], 1)] * 2


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def names_of(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("size", [None, "20KB", 10**9], ids=str)
def test_equal_to_merge_and_unload(case, tmp_path, size):
    auto, base, adapters = case
    merge(tmp_path / "out", base, adapters, max_shard_size=size)
    theirs, ours = oracle(auto, base, adapters), auto.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    plain = auto.from_pretrained(base).eval()
    assert (logits(plain) - logits(ours)).abs().max() > 1e-2
    state = ours.state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-6, rtol=1e-5)


def test_shards_keep_the_partition_or_the_size(case, tmp_path):
    _, base, adapters = case
    merge(tmp_path / "kept", base, adapters)
    before = json.loads((base / "model.safetensors.index.json").read_text())
    after = json.loads((tmp_path / "kept" / "model.safetensors.index.json").read_text())
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    assert names_of(tmp_path / "kept") == names_of(base)
    merge(tmp_path / "cut", base, adapters, max_shard_size="9KB")
    for shard in (tmp_path / "cut").glob("*.safetensors"):
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 9000
    merge(tmp_path / "one", base, adapters, max_shard_size="1GiB")
    assert [p.name for p in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(tmp_path, dtype):
    llama().to(dtype).save_pretrained(tmp_path / "base")
    paths = [adapter(llama(), tmp_path / f"a{n}", ["q_proj", "down_proj"], n) for n in range(2)]
    merge(tmp_path / "out", tmp_path / "base", paths)
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    layers = [read_adapter(p).layers for p in paths]
    assert set(after) == set(before)
    for key, value in after.items():
        layer = key.removesuffix(".weight")
        assert value.dtype == dtype
        exact = before[key].double()
        if layer in layers[0]:
            exact = exact + sum(
                w * a[layer].to(torch.float64).delta() for w, a in zip(WEIGHTS, layers, strict=True)
            )
            # Half a unit in the last place, and what float32 adds to it.
            unit = torch.finfo(dtype).eps * exact.abs()
            assert bool(((value.double() - exact).abs() <= 0.501 * unit + 1e-6).all())
        else:
            assert torch.equal(value, before[key])


def test_a_block_at_a_time_is_the_same(small, tmp_path, monkeypatch):
    base, adapters = small
    merge(tmp_path / "whole", base, adapters)
    monkeypatch.setattr("orthomerge.io.tensors.BLOCK", 300)
    merge(tmp_path / "blocks", base, adapters)
    whole, blocks = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "blocks"))
    for key, value in whole.items():
        torch.testing.assert_close(blocks[key], value, atol=1e-6, rtol=1e-6)


def test_dense_updates_none_and_what_comes_along(small, tmp_path):
    base, adapters = small
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("the base's card")
    (base / "pytorch_model.bin").write_text("left behind")
    plan = plan_merge([read_adapter(a).layers for a in adapters], weights=WEIGHTS)

    def dense(name):
        return None if name.endswith("o_proj") else plan.merge(name).update.delta()

    seen = []
    merge(
        tmp_path / "out", base, adapters, update_of=dense, extra={"merge.json": {"method": "x"}},
        readme="a card", progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    for key, value in after.items():
        assert torch.equal(value, before[key]) != key.endswith("q_proj.weight")
    assert names_of(tmp_path / "out") == sorted(
        ["README.md", "config.json", "generation_config.json", "merge.json", "model.safetensors",
         "tokenizer.json"]
    )  # fmt: skip
    assert (tmp_path / "out" / "README.md").read_text() == "a card"
    assert seen == [(n, 4) for n in range(1, 5)]


def test_each_layer_is_asked_for_once(case, tmp_path):
    _, base, adapters = case
    plan = plan_merge([read_adapter(a).layers for a in adapters], weights=WEIGHTS)
    asked = []

    def update_of(name):
        asked.append(name)
        return plan.merge(name).update

    merge(tmp_path / "out", base, adapters, update_of=update_of)
    assert sorted(asked) == sorted(plan.names)


# ---------------------------------------------------------------------------------------------
# Names, heads, ties


def test_a_trunk_takes_updates_of_a_model_with_a_head(tmp_path):
    model = tiny_bert()
    model.bert.save_pretrained(tmp_path / "backbone")
    paths = [adapter(tiny_bert(), tmp_path / f"a{n}", ["query", "dense"], n) for n in range(2)]
    with pytest.raises(AdapterError, match="'classifier'"):
        save_full_model(
            tmp_path / "no", tmp_path / "backbone", lambda _: None, names=["classifier"]
        )
    names = [n for n in read_adapter(paths[0]).layers if n.startswith("bert.encoder")]
    plan = plan_merge([read_adapter(p).layers for p in paths], weights=WEIGHTS)
    save_full_model(
        tmp_path / "out", tmp_path / "backbone", lambda n: plan.merge(n).update, names=names
    )
    model.save_pretrained(tmp_path / "whole")
    save_full_model(
        tmp_path / "expected", tmp_path / "whole", lambda n: plan.merge(n).update, names=names
    )
    ours = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    for key, value in AutoModel.from_pretrained(tmp_path / "expected").state_dict().items():
        assert torch.equal(ours[key], value)


def test_a_model_with_a_head_takes_updates_of_its_trunk(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "whole")
    name = "encoder.layer.1.attention.self.query"
    update = LoraFactors(torch.randn(2, 32), torch.randn(32, 2))
    save_full_model(tmp_path / "out", tmp_path / "whole", lambda _: update, names=[name])
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert changed == [f"bert.{name}.weight"]


@pytest.mark.parametrize(
    "whole", [False, True], ids=["added to a backbone", "in place of the head"]
)
def test_a_head_of_its_own(tmp_path, whole):
    """Three labels beside a backbone, or in the place of a head of two."""
    trained = tiny_bert(labels=3, seed=1)
    trained.bert.load_state_dict(tiny_bert().bert.state_dict())
    (tiny_bert() if whole else tiny_bert().bert).save_pretrained(tmp_path / "base")
    head = {k: v for k, v in trained.state_dict().items() if k.startswith("classifier")}
    labels = {str(n): f"LABEL_{n}" for n in range(3)}
    save_full_model(
        tmp_path / "out", tmp_path / "base", lambda _: None, names=[], modules=head,
        config={"architectures": ["BertForSequenceClassification"], "id2label": labels},
    )  # fmt: skip
    ours, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info["missing_keys"]) and not any(info["unexpected_keys"])
    torch.testing.assert_close(logits(ours.eval()), logits(trained), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", ["lm_head", "transformer.wte"])
@pytest.mark.parametrize("backbone", [False, True], ids=["whole", "backbone"])
def test_a_tie_is_undone_where_an_update_touches_it(tmp_path, layer, backbone):
    """The adapter changes one end of the tie, so the model with it is no longer tied."""
    model = gpt2()
    (model.transformer if backbone else model).save_pretrained(tmp_path / "base")
    if backbone:  # as the hub's gpt2: a bare checkpoint that says it is a causal model
        settings = json.loads((tmp_path / "base" / "config.json").read_text())
        settings["architectures"] = ["GPT2LMHeadModel"]
        (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    update = LoraFactors(torch.randn(2, 32), torch.randn(48, 2))
    save_full_model(tmp_path / "out", tmp_path / "base", lambda _: update, names=[layer])
    expected = gpt2()
    expected.lm_head.weight = torch.nn.Parameter(expected.lm_head.weight.detach().clone())
    with torch.no_grad():
        expected.get_submodule(layer).weight += update.delta()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not ours.config.tie_word_embeddings
    torch.testing.assert_close(logits(ours), logits(expected), atol=1e-5, rtol=1e-5)


def test_an_embedding_takes_an_update_of_either_orientation(small, tmp_path):
    base, _ = small
    update = LoraFactors(torch.randn(2, 48), torch.randn(32, 2))  # [d, vocab], as PEFT has it
    name = "model.embed_tokens"
    for number, given in enumerate((update, update.delta(), update.delta().T)):
        out = save_full_model(tmp_path / str(number), base, lambda _, u=given: u, names=[name])
        before, after = (load_file(p / "model.safetensors") for p in (base, out))
        torch.testing.assert_close(
            after[f"{name}.weight"], before[f"{name}.weight"] + update.delta().T
        )


def test_tied_three_times_is_refused(tmp_path):
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="tied"):
        save_full_model(tmp_path / "out", tmp_path / "base", lambda _: None, names=["lm_head"])
    assert not (tmp_path / "out").exists()


def test_biases_are_added_to_those_of_the_base(tmp_path):
    """As PEFT merges an adapter with lora_bias; a layer without a bias cannot take one."""
    tiny_bert().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(
        r=3, target_modules=["query", "dense"], lora_bias=True, init_lora_weights=False
    )
    get_peft_model(tiny_bert(), config).save_pretrained(tmp_path / "a")
    read = read_adapter(tmp_path / "a")
    save_full_model(
        tmp_path / "out", tmp_path / "base", read.layers.get, names=list(read.layers),
        biases=read.biases,
    )  # fmt: skip
    auto = AutoModelForSequenceClassification
    expected = PeftModel.from_pretrained(
        auto.from_pretrained(tmp_path / "base"), tmp_path / "a"
    ).merge_and_unload()
    state = auto.from_pretrained(tmp_path / "out").state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=1e-6, rtol=1e-5)

    llama().save_pretrained(tmp_path / "llama")
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(AdapterError, match="has no bias"):
        save_full_model(
            tmp_path / "no", tmp_path / "llama", lambda _: None, names=[name],
            biases={name: torch.ones(32)},
        )  # fmt: skip


def test_a_tied_bias_comes_along(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=32,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path / "base")
    name = "cls.predictions.decoder"
    update = LoraFactors(torch.randn(2, 32), torch.randn(48, 2))
    save_full_model(tmp_path / "out", tmp_path / "base", lambda _: update, names=[name])
    with torch.no_grad():
        expected = (
            logits(model)
            + model.cls.predictions.transform(model.bert(IDS).last_hidden_state) @ update.delta().T
        )
    ours = BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# Nothing is written


def nothing_left(folder):
    return not (folder / "out").exists() and not [p for p in folder.iterdir() if p.name[0] == "."]


def test_an_unknown_layer_is_named_with_the_nearest(small, tmp_path):
    base, _ = small
    with pytest.raises(AdapterError, match=r"'model.layers.0.self_attn.p_proj', the nearest is"):
        save_full_model(
            tmp_path / "out", base, lambda _: None, names=["model.layers.0.self_attn.p_proj"]
        )
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MergeError("no")], ids=["stop", "error"])
def test_interrupted_writing_leaves_nothing(small, tmp_path, problem):
    base, adapters = small
    calls = []

    def update_of(name):
        calls.append(name)
        if len(calls) == 3:
            raise problem
        return LoraFactors(torch.zeros(1, 32), torch.zeros(32, 1))

    with pytest.raises(BaseException) as raised:
        merge(tmp_path / "out", base, adapters, update_of=update_of)
    assert isinstance(raised.value, KeyboardInterrupt | MergeError)
    assert nothing_left(tmp_path)


def test_interrupted_overwriting_leaves_the_old_folder(small, tmp_path):
    base, adapters = small
    merge(tmp_path / "out", base, adapters, finish=lambda folder: seal(folder, "merge.json", {}))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def stop(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "out", base, adapters, update_of=stop, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    merge(tmp_path / "out", base, adapters, update_of=lambda _: None, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_an_output_that_is_not_empty(small, tmp_path):
    base, adapters = small
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for output, words in (("out", "not empty"), ("file", "is a file"), ("base", "the base model")):
        with pytest.raises(AdapterError, match=words):
            merge(tmp_path / output, base, adapters, overwrite=output == "base")
    assert names_of(tmp_path / "out") == ["mine.txt"]


def test_pickles_are_refused(small, tmp_path):
    base, adapters = small
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(AdapterError, match="pickled weights"):
        merge(tmp_path / "out", base, adapters)
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"neither model\.safetensors"):
        merge(tmp_path / "out", base, adapters)
    assert nothing_left(tmp_path)


def truncated(base):
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])


def no_header(base):
    (base / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b"{" * 9)


def no_config(base):
    (base / "config.json").unlink()


def escaping(base):
    shutil.move(base / "model.safetensors", base.parent / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": "../x.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def missing(base):
    (base / "model.safetensors").rename(base / "x.safetensors")
    index = {"weight_map": {"nothing.weight": "x.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(base):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


@pytest.mark.parametrize(
    "spoil", [truncated, no_header, no_config, escaping, missing, broken_index]
)
def test_a_base_that_cannot_be_read(small, tmp_path, spoil):
    base, adapters = small
    spoil(base)
    with pytest.raises(AdapterError):
        merge(tmp_path / "out", base, adapters)
    assert not (tmp_path / "out").exists()


def test_what_no_update_can_be_added_to(small, tmp_path):
    base, _ = small
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(base / "model.safetensors")
    wide = LoraFactors(torch.ones(1, 33), torch.ones(32, 1))
    loud = LoraFactors(torch.full((1, 32), 3e38), torch.full((32, 1), 3e38))
    for update, layer, words in (
        (wide, name, r"is \[32, 32\] in the checkpoint and its update \[32, 33\]"),
        (loud, name, "not finite"),
        (None, "model.norm", "only matrices"),
    ):
        with pytest.raises(AdapterError, match=words):
            save_full_model(tmp_path / "out", base, lambda _, u=update: u, names=[layer])
    with pytest.raises(AdapterError, match="keep one of them"):
        save_full_model(
            tmp_path / "out", base, lambda _: None, names=[name],
            modules={f"{name}.weight": torch.ones(32, 32)},
        )  # fmt: skip
    with pytest.raises(AdapterError, match="size '5 cm' is not a number with a unit"):
        save_full_model(tmp_path / "out", base, lambda _: None, names=[name], max_shard_size="5 cm")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="stored as I8"):
        save_full_model(tmp_path / "out", base, lambda _: None, names=[name])
    assert nothing_left(tmp_path)


def test_a_disk_that_is_too_small(small, tmp_path, monkeypatch):
    base, adapters = small
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("orthomerge.adapters.full_model.shutil.disk_usage", lambda _: full)
    with pytest.raises(AdapterError, match="GiB free"):
        merge(tmp_path / "out", base, adapters)
