"""Verbs that run a model with an adapter: what they cannot take into account is refused."""

from __future__ import annotations

import pytest
import torch
from odd_adapters import WEIGHTS, configured, refusal, rewritten, saved
from safetensors.torch import load_file, save_file
from tiny_text import easy_task, save_tiny
from transformers import AutoModelForCausalLM

from orthomerge.adapters import read_adapter
from orthomerge.adapters.heads import require_runnable

ASKED = ("--form", "text", "--template", "Text: {text}\nAnswer:")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "base")
    easy_task(folder / "a.jsonl", ("king", "queen"), 40)
    return folder


@pytest.fixture
def made(place, tmp_path):
    def make(added=0, biases=False, **config):
        def load():
            model = AutoModelForCausalLM.from_pretrained(place / "base")
            torch.manual_seed(0)
            model.resize_token_embeddings(model.config.vocab_size + added, mean_resizing=False)
            return model

        config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **config}
        folder = saved(tmp_path / "a", load, 1, base=place / "base", **config)
        if biases:  # PEFT asks for a base with biases, and this one has none
            tensors = load_file(folder / WEIGHTS)
            tensors |= {
                k.replace(".weight", ".bias"): v[:, 0].clone()
                for k, v in tensors.items()
                if "lora_B" in k
            }
            save_file(tensors, folder / WEIGHTS)
            configured(folder, lora_bias=True)
        return folder

    return make


VERBS = {
    "eval": lambda a, task, out: ("eval", a, "--task", task, *ASKED, "--rows", 4),
    "stats fisher": lambda a, task, out: (
        "stats", "fisher", a, "--task", task, *ASKED, "--samples", 4, "-o", out
    ),
    "distill": lambda a, task, out: (
        "distill", a, a, "--data", task, "--data", task, "--steps", 1, "-o", out
    ),
    "train": lambda a, task, out: ("train", a, "--task", task, *ASKED, "--rows", 8, "-o", out),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(place, made, tmp_path, verb, value):
    a = made()
    tensors = load_file(a / WEIGHTS)
    tensors[next(k for k in tensors if "lora_B" in k)][-1, -1] = value
    save_file(tensors, a / WEIGHTS)
    said = refusal(*VERBS[verb](a, place / "a.jsonl", tmp_path / "out"))
    assert all(word in said for word in (str(a), "q_proj", "not finite")), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_a_layer_that_the_base_does_not_have(place, made, tmp_path, verb):
    a = rewritten(made(), lambda key: key.replace("self_attn", "attn"))
    said = refusal(*VERBS[verb](a, place / "a.jsonl", tmp_path / "out"))
    assert all(word in said for word in (str(a), "layers.0.attn.q_proj", "self_attn")), said


BESIDE = {
    "lora_bias": {"biases": True},
    "for tokens": {"added": 3},
    "trained whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
@pytest.mark.parametrize("what", BESIDE)
def test_what_is_neither_layer_nor_head_is_not_left_out(place, made, tmp_path, verb, what):
    a = made(**BESIDE[what])
    said = refusal(*VERBS[verb](a, place / "a.jsonl", tmp_path / "out"))
    assert all(word in said for word in (str(a), what, "--save-as full")), said
    assert not (tmp_path / "out").exists()


def test_the_bases_own_rows_beside_an_adapted_head_are_no_hindrance(made):
    from orthomerge.adapters import align_adapters

    a = read_adapter(made(target_modules=["q_proj", "lm_head"]))
    assert a.copies
    require_runnable(*align_adapters([a]))
