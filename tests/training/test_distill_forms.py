"""Distillation of every kind of task: heads on five architectures, words, taggers, vectors."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call, make_texts
from five_architectures import llama as bf16_llama
from five_architectures import roberta
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_text import easy_task, save_tiny, tiny_language_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from orthomerge import distill_adapters, verify
from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, MergeError
from orthomerge.tasks import get_task, prompt_of
from orthomerge.training import DistillSettings
from orthomerge.training.distillation.chunks import token_distances

CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}


def gpt2(folder):
    tokenizer = tiny_language_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def t5(folder):
    """As T5 v1.1: a language head of its own, and an end token in every text."""
    tokenizer = tiny_language_tokenizer(seq2seq=True)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        dropout_rate=0.1, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert(folder, tiny_base):
    return tiny_base


BASES = {
    "bert": ("query value", None),
    "roberta": ("query value", roberta),
    "gpt2": ("c_attn", gpt2),
    "llama": ("q_proj v_proj down_proj", save_tiny),
    "llama in bfloat16": ("q_proj v_proj", bf16_llama),
    "t5": ("q v wo", t5),
    "gpt2 with embeddings": ("c_attn wte", gpt2),
}

# Deviations of B at which random adapters disturb each other and training is not hopeless.
SIZES = {"t5": 0.05, "llama": 0.3}


def make(folder, base, task_type, targets, seed, *, labels=3, size=0.7, heads=None):
    """A random adapter as PEFT writes one."""
    more = {"num_labels": labels} if task_type in ("SEQ_CLS", "TOKEN_CLS") else {}
    model = CLASSES[task_type].from_pretrained(base, **more)
    heads = ["classification_head"] if task_type == "SEQ_CLS" and "t5" in str(base) else heads
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=targets.split(), task_type=task_type,
        modules_to_save=heads,
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)

    def fill(weight, std):
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                fill(weight, 1.0)
            elif "lora_B" in name or "lora_embedding_B" in name:
                fill(weight, size)
            elif "modules_to_save" in name:
                fill(weight, 0.5)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture
def world(tmp_path, tiny_base):
    def build(base, task_type, count=2, **more):
        targets, write = BASES[base]
        folder = write(tmp_path / base.replace(" ", "-")) if write else tiny_base
        size = next((v for name, v in SIZES.items() if base.startswith(name)), 0.7)
        return folder, [
            make(tmp_path / f"task{i}", folder, task_type, targets, i + 1, size=size, **more)
            for i in range(count)
        ]

    return build


TEXTS = [make_texts(24, seed) for seed in range(2)]
FAST = DistillSettings(steps=12, learning_rate=5e-3, batch_size=12, evaluate_every=4, held_out=0.0)

HEADED = [name for name in BASES if name != "gpt2 with embeddings"]


@pytest.mark.parametrize("base", HEADED)
def test_heads_are_the_models_own_on_every_architecture(world, base, tmp_path):
    folder, adapters = world(base, "SEQ_CLS")
    done = distill_adapters(adapters, TEXTS, settings=FAST, cache=tmp_path / "cache")
    assert done.best.distance < 0.9 * done.measured[0].distance
    # What the first teacher said is what PEFT's own forward pass says.
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    kept = load_file(next((tmp_path / "cache").glob("task0-*")))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(model, str(adapters[0])).eval()
    from orthomerge.statistics import sample_texts

    drawn = [t for t, _ in sample_texts([(t, None) for t in TEXTS[0]], 100, 0)]
    batch = tokenizer(drawn, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        said = model(**batch).logits.float()
    loose = {"rtol": 0.05, "atol": 0.05} if "bfloat16" in base else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(kept["answers"], said, **loose)


LANGUAGE = [("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"),
            ("gpt2 with embeddings", "CAUSAL_LM"), ("llama in bfloat16", "CAUSAL_LM")]  # fmt: skip


@pytest.mark.parametrize(("base", "kind"), LANGUAGE)
def test_a_language_model_comes_nearer_on_unlabelled_text(world, base, kind, tmp_path):
    _, adapters = world(base, kind)
    done = distill_adapters(adapters, TEXTS, settings=FAST, output=tmp_path / "out")
    assert done.best.distance < 0.9 * done.measured[0].distance
    assert set(done.best.agreement) == {"task0", "task1"}
    assert all(0 <= v <= 1 for v in done.best.agreement.values())
    assert all(check.good for check in verify(tmp_path / "out"))
    assert read_adapter(tmp_path / "out").config["task_type"] == kind


@pytest.mark.parametrize(
    ("base", "kind"), [*LANGUAGE, ("bert", "FEATURE_EXTRACTION"), ("bert", "TOKEN_CLS")]
)
def test_one_adapter_alone_stays_itself(world, base, kind):
    _, adapters = world(base, kind, count=1)
    done = distill_adapters(
        adapters, TEXTS[:1], weights=1.0, settings=DistillSettings(steps=2, evaluate_every=1)
    )
    exact = 1e-4 if "bfloat16" in base else 1e-7
    assert abs(done.measured[0].distance) < exact
    assert abs(done.best.distance) < exact
    assert done.best.agreement["task0"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("answer_tokens", [None, 3])
def test_the_language_model_that_is_written_is_the_student(world, answer_tokens, tmp_path):
    """Its own forward pass in PEFT is as near to the teacher as was measured."""
    folder, adapters = world("gpt2", "CAUSAL_LM")
    done = distill_adapters(
        adapters, TEXTS, settings=FAST, answer_tokens=answer_tokens, output=tmp_path / "out"
    )
    tokenizer = tiny_language_tokenizer()
    batch = tokenizer(make_texts(20, 77), return_tensors="pt", padding=True)
    mask = batch["attention_mask"].bool()

    def logs(adapter):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
        with torch.no_grad():
            return model.eval()(**batch).logits[mask].log_softmax(-1)

    from orthomerge import merge_adapters

    merge_adapters(adapters, weights=done.scale, output=tmp_path / "sum")
    teachers = [logs(a) for a in adapters]
    far, near = (
        sum(float((t.exp() * (t - s)).sum(-1).mean()) for t in teachers)
        for s in (logs(tmp_path / "sum"), logs(tmp_path / "out"))
    )
    assert near < far


@pytest.mark.parametrize(("base", "kind"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_tasks_in_words_are_compared_at_the_teachers_own_answers(world, base, kind, tmp_path):
    _, adapters = world(base, kind)
    tasks = [
        get_task(str(easy_task(tmp_path / f"{i}.jsonl", words, 40)))
        for i, words in enumerate([("king", "queen"), ("dark", "bright")])
    ]
    texts = [[(r.text, r.pair) for r in t.pools()["train"]] for t in tasks]
    prompts = [prompt_of(task) for task in tasks]
    done = distill_adapters(
        adapters, texts, prompts=prompts, samples=16, settings=FAST, cache=tmp_path / "cache"
    )
    assert done.best.distance < done.measured[0].distance
    from safetensors import safe_open

    with safe_open(next((tmp_path / "cache").glob("task0-*")), framework="pt") as kept:
        examples = json.loads(kept.metadata()["examples"])
        counts = kept.get_tensor("counts").tolist()
    tokenizer = tiny_language_tokenizer(seq2seq=base == "t5")
    from orthomerge.prompting import Wording

    config = AutoModelForCausalLM if base == "llama" else AutoModelForSeq2SeqLM
    model = config.from_pretrained(read_adapter(adapters[0]).base_model)
    wording = Wording.of(prompts[0], tokenizer, model.config)
    for example, count in zip(examples, counts, strict=True):
        answered = count - example["asked"]
        assert 1 <= answered <= wording.longest + 2


def test_a_tagger_and_an_embedding_model_come_nearer(world, tmp_path):
    _, taggers = world("bert", "TOKEN_CLS")
    done = distill_adapters(taggers, TEXTS, settings=FAST)
    assert done.best.distance < 0.9 * done.measured[0].distance
    _, embedders = world("bert", "FEATURE_EXTRACTION")
    for pooling in ("mean", "cls", "last"):
        done = distill_adapters(embedders, TEXTS, settings=FAST, pooling=pooling)
        assert done.best.distance < 0.95 * done.measured[0].distance, pooling
        assert done.best.agreement["task0"] > 0.5


def test_the_divergence_is_the_same_in_every_cut():
    torch.manual_seed(0)
    W = torch.randn(50, 8, dtype=torch.float64)
    ours = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(13, 8, dtype=torch.float64)

    def of(entries):
        found = token_distances(
            ours, theirs, lambda h: h @ W.T, lambda h: h @ W.T, vocabulary=50, entries=entries
        )
        (gradient,) = torch.autograd.grad(found.divergence.sum(), ours)
        return found.divergence, found.same, gradient

    p = (theirs @ W.T).softmax(-1)
    dense = (p * (p.log() - (ours @ W.T).log_softmax(-1))).sum(-1)
    (expected,) = torch.autograd.grad(dense.sum(), ours)
    for entries in (1, 120, 350, 10**6):
        divergence, same, gradient = of(entries)
        torch.testing.assert_close(divergence, dense, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert same.equal((ours @ W.T).argmax(-1) == (theirs @ W.T).argmax(-1))


def test_what_cannot_be_right_is_refused(world, tmp_path, tiny_base):
    folder, (one, _) = world("gpt2", "CAUSAL_LM")
    classifier = make(tmp_path / "c", tiny_base, "SEQ_CLS", "query", 5)
    with pytest.raises(AdapterError, match="use those of one kind"):
        distill_adapters([one, classifier], TEXTS)
    with pytest.raises(MergeError, match="are pairs"):
        distill_adapters([one], [[("a", "b"), ("c", "d")]])
    headed = make(tmp_path / "h", folder, "CAUSAL_LM", "c_attn", 5, heads=["lm_head"])
    with pytest.raises(AdapterError, match="trained whole"):
        distill_adapters([headed], TEXTS[:1])
    outer = make(tmp_path / "o", tiny_base, "SEQ_CLS", "query dense", 5)
    assert distill_adapters([outer], TEXTS[:1], settings=DistillSettings(steps=1))
    pooled = make(tmp_path / "p", tiny_base, "SEQ_CLS", "query", 5, heads=["pooler", "classifier"])
    with pytest.raises(AdapterError, match="on top of the backbone"):
        distill_adapters([pooled], TEXTS[:1])
    output = make(tmp_path / "l", folder, "CAUSAL_LM", "lm_head", 5)
    with pytest.raises(AdapterError, match="behind the backbone"):
        distill_adapters([output], TEXTS[:1])
    with pytest.raises(MergeError, match="form"):
        distill_adapters([one], TEXTS[:1], form="poem")


def test_the_command_asks_language_models_in_words(world, tmp_path):
    _, adapters = world("llama", "CAUSAL_LM")
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[0]))
    said = json.loads(
        call("distill", *adapters, "--data", file, "--data", file, "--answer-tokens", 2,
             "--steps", 2, "--samples", 8, "--output", tmp_path / "out", "--json", "--quiet")
    )  # fmt: skip
    assert set(said["agreement"]) == {"task0", "task1"}
    assert said["teachers"]["bytes"] > 0
    assert not (tmp_path / "out.distill").exists()
