"""Tiny models of the paper's five architectures, as folders with tokenizers, and a copy of GLUE.

The classes, the folders, the columns and the label sets are the real ones; weights and words are
made here.
"""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import torch
from conftest import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from orthomerge.tasks import glue

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def _tokenizer(single: str, pair: str, **special: str) -> PreTrainedTokenizerFast:
    words = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    used = [(t, words[t]) for t in SPECIAL if t in single]
    tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def roberta(folder: Path) -> Path:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RobertaConfig(
        vocab_size=64, intermediate_size=48, max_position_embeddings=140, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, type_vocab_size=1, **size,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(folder)
    pair = "<s> $A </s> </s> $B </s>"
    _tokenizer("<s> $A </s>", pair, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
               cls_token="<s>", sep_token="</s>").save_pretrained(folder)  # fmt: skip
    return folder


def t5(folder: Path) -> Path:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer("$A </s>", "$A </s> $B </s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    return folder


def llama(folder: Path, heads: int = 4, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Without a padding token, in bfloat16, with grouped key and value heads, as published."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=2, bos_token_id=0, eos_token_id=2,
        pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    _tokenizer("<s> $A", "<s> $A <s> $B", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


MODELS = {
    "roberta-large": roberta,
    "t5-large": t5,
    "llama-3.2-1b": llama,
    "llama-3.2-3b": lambda folder: llama(folder, heads=2),
    "llama-3-8b": lambda folder: llama(folder, heads=8),
}
TARGETS = {
    "roberta": ["query", "value"],
    "t5": ["q", "v"],
    "llama": ["q_proj", "v_proj"],
}


def model_of(name: str, folder: Path) -> Path:
    """A tiny model of the recipe's architecture in `folder`."""
    torch.manual_seed(0)
    return MODELS[name](folder)


def write_glue(folder: Path, train: int = 60, test: int = 24) -> Path:
    """A copy of `nyu-mll/glue` in its layout: a folder a config, Parquet files named by split.

    The labels can be learnt: each is a word of the text.
    """
    draw = random.Random(0)
    for definition in glue.DEFINITIONS:
        splits = {"train": train, definition.test: test, "test": 6}
        if definition.config == "mnli":
            splits = {"train": train, "validation_matched": test, "validation_mismatched": 5,
                      "test_matched": 6, "test_mismatched": 6}  # fmt: skip
        for split, count in splits.items():
            labelled = not split.startswith("test")
            _rows(definition, count, labelled, draw).to_parquet(
                _made(folder / definition.config) / f"{split}-00000-of-00001.parquet"
            )
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _rows(definition, count: int, labelled: bool, draw: random.Random) -> datasets.Dataset:
    labels = len(definition.labels)
    found: dict[str, list] = {definition.text: [], "label": [], "idx": list(range(count))}
    if definition.pair:
        found[definition.pair] = []
    for number in range(count):
        label = number % labels if labels else (number % 26) / 5
        words = draw.choices(WORDS[10:], k=draw.randint(3, 9))
        found[definition.text].append(" ".join([WORDS[int(label)], *words]))
        if definition.pair:
            found[definition.pair].append(" ".join(draw.choices(WORDS[10:], k=4)))
        found["label"].append(label if labelled else -1)
    text = datasets.Value("string")
    kind = datasets.ClassLabel(names=list(definition.labels)) if labels else "float32"
    kind = kind if labels else datasets.Value("float32")
    features = dict.fromkeys(found, text) | {"label": kind, "idx": datasets.Value("int32")}
    return datasets.Dataset.from_dict(found, features=datasets.Features(features))
