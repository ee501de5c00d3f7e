"""Tiny models and texts that every test can share; nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before torch is loaded, and for every process that a test starts: on tensors as small as these a
# second thread costs more than it brings, and the suite's own processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)
from typer.testing import CliRunner

from orthomerge.cli import app

# How long an example takes is the machine's matter, not the test's.
settings.register_profile("orthomerge", deadline=None)
settings.load_profile("orthomerge")

# Fixtures of a kind of their own, in files of their own.
pytest_plugins = ["browser.chromium"]

_VOCABULARY = """
the a film plot good bad fun dull slow bright dark story love war king queen city night day house
river runs sings falls wins loses and or not very quite never always old new red blue
"""
WORDS = _VOCABULARY.split()


def tiny_bert(labels: int = 2, seed: int = 0, layers: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).eval()


def make_tokenizer(folder: Path) -> BertTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"))


def make_base(folder: Path, tokenizer: BertTokenizerFast) -> Path:
    """A model folder as a user would have it: config, safetensors, tokenizer."""
    tiny_bert().bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)


def make_texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        texts.append(" ".join(WORDS[i] for i in picks))
    return texts


def write_task(path: Path, count: int = 120, seed: int = 0, regression: bool = False) -> Path:
    """A task file whose label can be read off the text: does it hold an even number of words?"""
    rows = []
    for text in make_texts(count, seed):
        label = float(len(text.split())) + 0.5 if regression else "ab"[text < "h"]
        rows.append({"text": text, "label": label})
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_line_for_slow_machines(monkeypatch):
    """What a command prints does not depend on how long it takes here."""
    monkeypatch.setattr("orthomerge.cli._progress._EVERY", float("inf"))


def printed(*arguments: object) -> str:
    """What a command prints on standard output, without its notes."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def call(*arguments: object) -> str:
    """What a command prints; its error, or a status that is not 0, fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
