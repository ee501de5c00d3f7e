"""Whole tensors beside LoRA: added tokens, trained embeddings, heads, and the tokenizer."""

from __future__ import annotations

import json

import pytest
import torch
from odd_adapters import (
    IDS,
    WEIGHTS,
    WORDS,
    by_peft,
    close,
    drawn,
    llama,
    logits,
    refusal,
    rewritten,
    saved,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from orthomerge.adapters import merge_adapters, merge_to_model, read_adapter
from orthomerge.errors import AdapterError, OrthomergeWarning

ADDED = 3
ALL_IDS = torch.arange(WORDS + ADDED)[None]


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


BASES = {
    "untied": lambda: llama(tie_word_embeddings=False),
    "tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
}


@pytest.fixture(params=list(BASES))
def base(request, tmp_path):
    BASES[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder, added=0, seed=3):
    """The model of a folder, with rows for added tokens drawn under `seed`."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    if added:
        model.resize_token_embeddings(WORDS + added, mean_resizing=False)
        # Older ones of Transformers leave the old number on a head that is tied.
        model.get_output_embeddings().out_features = WORDS + added
    return model


def merged_in(folder, model):
    """The model with an adapter merged into it by PEFT, in place."""
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


def whole(folder, expect_rows):
    """A full model as it was written: loaded without a word missing, and as wide as it says."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == expect_rows
    return model.eval()


def ends(folder):
    """What a model calls its input embeddings, and a linear layer of it."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return ("wte", "c_attn") if kind == "gpt2" else ("embed_tokens", "q_proj")


# ---------------------------------------------------------------------------------------------
# Added tokens

TOKENS = {
    "a linear layer": lambda e, q: {"target_modules": [q]},
    "embeddings and head": lambda e, q: {"target_modules": [q, e, "lm_head"]},
    "the embeddings trained": lambda e, q: {"target_modules": [q], "modules_to_save": [e]},
    "both trained": lambda e, q: {"target_modules": [q], "modules_to_save": [e, "lm_head"]},
}


@pytest.mark.parametrize("what", TOKENS)
def test_added_tokens_keep_their_rows(base, tmp_path, what):
    config = TOKENS[what](*ends(base))
    a = saved(tmp_path / "a", lambda: loaded(base, ADDED), 1, base=base, **config)
    expected = logits(drawn(loaded(base, ADDED), 1, **config), input_ids=ALL_IDS)
    merge_to_model([a], tmp_path / "model", weights=1.0)
    close(logits(whole(tmp_path / "model", WORDS + ADDED), input_ids=ALL_IDS), expected)
    # PEFT reads the rows from the merged adapter, too: here the model has others.
    merge_adapters([a], weights=1.0, output=tmp_path / "out")
    ours = by_peft(tmp_path / "out", loaded(base, ADDED, seed=4))
    close(logits(ours, input_ids=ALL_IDS), expected)


def test_one_of_two_adapters_has_added_tokens(base, tmp_path):
    embeddings, linear = ends(base)
    a = saved(tmp_path / "a", lambda: loaded(base, ADDED), 1, base=base, target_modules=[linear])
    b = saved(tmp_path / "b", lambda: loaded(base), 2, base=base, target_modules=[linear])
    merge_to_model([b, a], tmp_path / "model", weights=1.0)
    expected = merged_in(b, merged_in(a, loaded(base, ADDED)))
    ours = whole(tmp_path / "model", WORDS + ADDED)
    close(logits(ours, input_ids=ALL_IDS), logits(expected, input_ids=ALL_IDS))
    assert embeddings


def test_rows_that_differ_are_refused_or_averaged(base, tmp_path):
    _, linear = ends(base)
    a, b = (
        saved(tmp_path / name, lambda: loaded(base, ADDED, seed), seed, base=base,  # noqa: B023
              target_modules=[linear])
        for seed, name in enumerate("ab")
    )  # fmt: skip
    for form in ("adapter", "full"):
        said = refusal("merge", a, b, "--save-as", form, "-o", tmp_path / "out")
        assert all(word in said for word in (str(a), str(b), ".weight", "--heads average")), said
        assert not (tmp_path / "out").exists()
    merge_to_model([a, b], tmp_path / "mean", heads="average", weights=1.0)
    ours = whole(tmp_path / "mean", WORDS + ADDED).get_input_embeddings().weight
    rows = [loaded(base, ADDED, seed).get_input_embeddings().weight for seed in (0, 1)]
    close(ours, sum(rows) / 2)


def test_other_numbers_of_added_tokens_are_refused(base, tmp_path):
    a, b = (
        saved(tmp_path / str(n), lambda: loaded(base, n), n, base=base,  # noqa: B023
              target_modules=[ends(base)[1]])
        for n in (2, 3)
    )  # fmt: skip
    for heads in ("keep", "average"):
        said = refusal("merge", a, b, "--heads", heads, "-o", tmp_path / "out")
        assert all(word in said for word in (str(a), str(b), "[42, 16]", "[43, 16]", "tokens"))


def test_rows_of_one_end_alone_make_no_model(tmp_path):
    """PEFT saves the embeddings that are adapted, and the others' new rows are lost with it."""
    base = tmp_path / "base"
    llama().save_pretrained(base)
    a = saved(tmp_path / "a", lambda: loaded(base, ADDED), 1, base=base,
              target_modules=["lm_head", "q_proj"])  # fmt: skip
    said = refusal("merge", a, "--save-as", "full", "-o", tmp_path / "out")
    assert all(word in said for word in ("lm_head.weight", "43", "40", "save_embedding_layers"))
    rewritten(a, lambda key: None if "base_layer" in key else key)
    said = refusal("merge", a, "--save-as", "full", "-o", tmp_path / "out")
    assert all(word in said for word in ("lm_head", "[43, 16]", "save_embedding_layers"))
    assert not (tmp_path / "out").exists()


def test_the_bases_own_rows_are_not_written_again(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    a = saved(tmp_path / "a", lambda: loaded(tmp_path / "base"), 1, base=tmp_path / "base",
              target_modules=["lm_head", "q_proj"])  # fmt: skip
    assert any("base_layer" in key for key in load_file(a / WEIGHTS))
    merge_adapters([a], weights=1.0, output=tmp_path / "out")
    assert not any("base_layer" in key for key in load_file(tmp_path / "out" / WEIGHTS))


def test_the_state_of_a_whole_model_is_refused(tmp_path):
    a = saved(tmp_path / "a", llama, 1, target_modules=["q_proj"])
    state = {f"base_model.model.{k}": v.clone() for k, v in llama().state_dict().items()}
    wrapped = {k.replace("q_proj.w", "q_proj.base_layer.w"): v for k, v in state.items()}
    save_file({**wrapped, **load_file(a / WEIGHTS)}, a / WEIGHTS)
    said = refusal("merge", a, "-o", tmp_path / "out")
    assert all(word in said for word in (str(a), "whole model", "save_pretrained"))


# ---------------------------------------------------------------------------------------------
# Ties

TIED = {
    "the embeddings trained": {"modules_to_save": ["embed_tokens"]},
    "both, and still tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "the head trained": {"modules_to_save": ["lm_head"]},
    "both trained": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "the head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "one adapted, one trained": {
        "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]
    },
    "adapted, and still tied": {
        "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True
    },
}  # fmt: skip


@pytest.mark.parametrize("what", TIED)
def test_a_tie_is_undone_and_the_configuration_says_so(tmp_path, what):
    base = tmp_path / "base"
    BASES["tied"]().save_pretrained(base)
    config = {"target_modules": ["q_proj"], **TIED[what]}
    a = saved(tmp_path / "a", lambda: loaded(base), 1, base=base, **config)
    expected = logits(drawn(loaded(base), 1, **config))
    merge_to_model([a], tmp_path / "model", weights=1.0)
    close(logits(whole(tmp_path / "model", WORDS)), expected)
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    assert said["tie_word_embeddings"] is False
    merge_adapters([a], weights=1.0, output=tmp_path / "out")
    close(logits(by_peft(tmp_path / "out", loaded(base))), expected)


def test_a_tie_that_nothing_touches_stays(tmp_path):
    base = tmp_path / "base"
    BASES["tied"]().save_pretrained(base)
    for added in (0, ADDED):
        a = saved(tmp_path / f"a{added}", lambda: loaded(base, added), 1, base=base,  # noqa: B023
                  target_modules=["q_proj"])  # fmt: skip
        merge_to_model([a], tmp_path / f"model{added}", weights=1.0)
        said = json.loads((tmp_path / f"model{added}" / "config.json").read_text())
        assert said["tie_word_embeddings"] is True
        assert said["vocab_size"] == WORDS + added


# ---------------------------------------------------------------------------------------------
# Parts of the model that were trained whole, and heads

LM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


@pytest.fixture
def two(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    load = lambda: loaded(tmp_path / "base")  # noqa: E731
    a = saved(tmp_path / "a", load, 1, base=tmp_path / "base", **LM)
    b = saved(tmp_path / "b", load, 2, base=tmp_path / "base", **LM)
    return load, a, b


def head_taken(folder, other):
    """The adapter with the trained head of another."""
    tensors, theirs = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    save_file({k: theirs[k] if "lm_head" in k else v for k, v in tensors.items()}, folder / WEIGHTS)


def together(load, a, b):
    """Both adapters' updates in one model by PEFT, with the head of the first."""
    return merged_in(a, merged_in(b, load()))


@pytest.mark.parametrize("same", [True, False])
def test_a_trained_head_of_a_language_model_is_in_the_merge(two, tmp_path, same):
    load, a, b = two
    if same:
        head_taken(b, a)
    else:
        b = saved(tmp_path / "bare", load, 2, base=tmp_path / "base", task_type="CAUSAL_LM",
                  target_modules=["q_proj"])  # fmt: skip
    expected = logits(together(load, a, b))
    for order in ([a, b], [b, a]):
        name = order[0].name
        merge_to_model(order, tmp_path / f"model-{name}", weights=1.0)
        close(logits(whole(tmp_path / f"model-{name}", WORDS)), expected)
        merge_adapters(order, weights=1.0, output=tmp_path / f"out-{name}")
        close(logits(by_peft(tmp_path / f"out-{name}", load())), expected)
        assert not (tmp_path / f"out-{name}" / "heads").exists()


def test_trained_heads_of_language_models_that_differ_are_refused_or_averaged(two, tmp_path):
    load, a, b = two
    for form in ("adapter", "full"):
        said = refusal("merge", a, b, "--save-as", form, "-o", tmp_path / "out")
        assert all(w in said for w in (str(a), str(b), "lm_head.weight", "--heads average"))
        assert not (tmp_path / "out").exists()
    mean = sum(by_peft(f, load()).merge_and_unload().lm_head.weight for f in (a, b)) / 2
    merge_to_model([a, b], tmp_path / "model", weights=1.0, heads="average")
    close(whole(tmp_path / "model", WORDS).lm_head.weight, mean)
    merge_adapters([a, b], weights=1.0, heads="average", output=tmp_path / "out")
    close(by_peft(tmp_path / "out", load()).merge_and_unload().lm_head.weight, mean)


def test_a_head_trained_whole_here_and_adapted_there_is_refused(two, tmp_path):
    load, a, _ = two
    b = saved(tmp_path / "c", load, 2, base=tmp_path / "base", task_type="CAUSAL_LM",
              target_modules=["q_proj", "lm_head"])  # fmt: skip
    for heads in ("keep", "average"):
        said = refusal("merge", a, b, "--heads", heads, "-o", tmp_path / "out")
        assert all(word in said for word in (str(a), str(b), "'lm_head'", "one of the two"))


def test_one_classifier_as_a_full_model_has_its_head(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24,
             "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).save_pretrained(
        tmp_path / "base"
    )
    load = lambda: AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")  # noqa: E731
    config = {"base": tmp_path / "base", "task_type": "SEQ_CLS", "target_modules": ["query"]}
    a, b = (saved(tmp_path / n, load, i, **config) for i, n in enumerate("ab"))
    merge_to_model([a], tmp_path / "one", weights=1.0)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one").eval()
    close(logits(ours), logits(by_peft(a, load())))
    # Two heads that differ: both are beside the model, as they are beside an adapter.
    merge_to_model([a, b], tmp_path / "two", weights=1.0)
    assert {p.stem for p in (tmp_path / "two" / "heads").iterdir()} == {"a", "b"}


# ---------------------------------------------------------------------------------------------
# Tokenizers


def words(folder, *added, **settings):
    """A tokenizer of 40 words, and what was added to it."""
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", **settings)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def plain(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    words(tmp_path / "base")
    return [
        saved(tmp_path / n, lambda: loaded(tmp_path / "base", ADDED), i, base=tmp_path / "base",
              target_modules=["q_proj"])
        for i, n in enumerate("ab")
    ]  # fmt: skip


def test_the_tokenizer_beside_an_adapter_goes_with_the_merge(plain, tmp_path):
    words(plain[1], "<x>", "<y>", "<z>", chat_template="{{ messages[0]['content'] }}")
    for out in (tmp_path / "model", tmp_path / "out"):
        merge = merge_to_model if out.name == "model" else merge_adapters
        merge(plain, output=out, weights=1.0)
        found = AutoTokenizer.from_pretrained(out)
        assert found.convert_tokens_to_ids(["w5", "<z>"]) == [5, 42]
        assert found.chat_template == "{{ messages[0]['content'] }}"
    assert len(found) == whole(tmp_path / "model", WORDS + ADDED).config.vocab_size


def test_tokenizers_of_other_tokens_are_refused_where_there_are_rows_for_them(plain, tmp_path):
    words(plain[0], "<x>", "<y>", "<z>")
    words(plain[1], "<x>", "<z>", "<y>")
    said = refusal("merge", *plain, "--save-as", "full", "-o", tmp_path / "out")
    assert all(word in said for word in (str(plain[0]), str(plain[1]), "41", "<y>", "<z>"))
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_differ_are_said(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    words(tmp_path / "base")
    load = lambda: loaded(tmp_path / "base")  # noqa: E731
    a, b, c = (
        saved(tmp_path / n, load, 1, base=tmp_path / "base", target_modules=["q_proj"])
        for n in "abc"
    )
    words(a)
    words(b, chat_template="{{ messages }}")
    with pytest.warns(OrthomergeWarning, match="differ in chat_template"):
        merge_to_model([a, b], tmp_path / "one", weights=1.0)
    words(b, "<pad>")
    words(c, "[PAD]")
    with pytest.warns(OrthomergeWarning, match=r"the token 40 is '<pad>' and '\[PAD\]'.*none goes"):
        merge_to_model([b, c], tmp_path / "two", weights=1.0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "two")) == WORDS
    with pytest.warns(OrthomergeWarning, match=r"'<pad>' \(40\).*40 rows"):
        merge_to_model([b], tmp_path / "three", weights=1.0)


def test_a_tokenizer_that_cannot_be_read_is_named(plain, tmp_path):
    (plain[0] / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterError, match=r"tokenizer\.json.*JSON"):
        merge_adapters(plain, output=tmp_path / "out")
    assert read_adapter(plain[0]).copies
    assert IDS.max() < WORDS
