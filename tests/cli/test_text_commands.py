"""A task in words from the command line: trained, merged, scored both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call
from tiny_text import LLAMA_TARGETS, T5_TARGETS, easy_task, save_tiny

from orthomerge.adapters import new_lora, save_start
from orthomerge.models.loading import load_for


@pytest.mark.parametrize("seq2seq", [False, True], ids=["decoder", "encoder-decoder"])
def test_a_text_adapter_learns_and_still_knows_it_when_merged(tmp_path, seq2seq):
    base = save_tiny(tmp_path / "base", seq2seq=seq2seq)
    kind = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    tasks = [
        easy_task(tmp_path / "a.jsonl", ("king", "queen"), 600, seed=0),
        easy_task(tmp_path / "b.jsonl", ("red", "blue"), 600, seed=1),
    ]
    words = ("--form", "text", "--template", "{text}\nAnswer:")
    for seed, task in enumerate(tasks):
        targets = T5_TARGETS if seq2seq else LLAMA_TARGETS
        model = load_for(str(base), kind)
        lora = new_lora(model, targets=targets, rank=8, alpha=16, task_type=kind, seed=seed)
        save_start(lora, tmp_path / "start")
        call("train", tmp_path / "start", "--task", task, *words, "--learning-rate", 1e-2,
             "--epochs", 4, "--rows", 300, "--output", tmp_path / task.stem)  # fmt: skip
    call("merge", *(tmp_path / t.stem for t in tasks), "--method", "task_arithmetic",
         "--base", base, "--output", tmp_path / "merged")  # fmt: skip
    for task in tasks:
        for scoring in ("likelihood", "generation"):
            for folder in (task.stem, "merged"):
                said = call("eval", tmp_path / folder, "--task", task, *words, "--scoring",
                            scoring, "--rows", 100, "--base", base, "--json")  # fmt: skip
                accuracy = json.loads(said)["metrics"]["accuracy"]
                print(folder, scoring, accuracy)
                assert accuracy > (0.8 if folder != "merged" else 0.6)


def test_every_command_of_the_page_on_words_works(tmp_path, monkeypatch):
    """In their order, on a tiny Llama; a step writes what the next one reads."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    from blocks import SHELL, blocks

    monkeypatch.chdir(tmp_path)
    save_tiny(Path("base"))
    easy_task(Path("mine.jsonl"), ("king", "queen"), 330, seed=0)
    easy_task(Path("theirs.jsonl"), ("red", "blue"), 330, seed=1)
    easy_task(Path("mine-test.jsonl"), ("king", "queen"), 40, seed=2)
    easy_task(Path("theirs-test.jsonl"), ("red", "blue"), 40, seed=3)
    page = [b for b in blocks("docs/text-to-text.md") if b.language in SHELL]
    found = [words[1:] for block in page for words in block.commands]
    assert {"stats", "init", "train", "merge", "eval"} <= {c[0] for c in found}
    assert ["stats", "fisher"] in [c[:2] for c in found]
    for arguments in found:
        assert call(*("base" if a.startswith("meta-llama/") else a for a in arguments)), arguments
