"""Tiny language models with real tokenizers, trained here; nothing is downloaded."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from conftest import WORDS, make_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from orthomerge.tasks import list_tasks, prompt_of

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
T5_TARGETS = ["q", "k", "v", "o", "wi", "wo"]


@cache
def tiny_language_tokenizer(*, seq2seq: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a text begins with <s> for a decoder, ends with </s> for an encoder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [prompt_of(t).ask(w, w) for t in list_tasks() for w in WORDS]
    texts += [w for _ in range(30) for w in (*make_texts(40), " yes", " no", " rotten", " fresh")]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=560,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    around = "$A </s>" if seq2seq else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_llama(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _louder(LlamaForCausalLM(config).eval())


def tiny_t5(vocabulary: int, seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return T5ForConditionalGeneration(config).eval()


def _louder(model):
    """Weights of a size that attention and answers differ by what is read, as in a real model."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return model


def save_tiny(folder: Path, *, seq2seq: bool = False, seed: int = 0) -> Path:
    """A folder as a user would have it."""
    tokenizer = tiny_language_tokenizer(seq2seq=seq2seq)
    model = (tiny_t5 if seq2seq else tiny_llama)(len(tokenizer), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def easy_task(path: Path, words: tuple[str, str], count: int = 400, seed: int = 0) -> Path:
    """Which of two words stands in the text? The answers are "yes" (the second) and "no"."""
    rows = []
    for i, text in enumerate(make_texts(count, seed)):
        kept = [w for w in text.split() if w not in words][:5]
        label = i % 2
        place = (7 * i) % (len(kept) + 1)
        kept.insert(place, words[label])
        rows.append({"text": " ".join(kept), "label": ["no", "yes"][label]})
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path


def regression_task(path: Path, count: int = 60) -> Path:
    rows = [{"text": t, "label": len(t.split()) / 10 + 0.01} for t in make_texts(count)]
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path
