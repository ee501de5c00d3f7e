"""Fisher information of answers in words, against gradients of the weights themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import make_texts
from tiny_text import tiny_language_tokenizer, tiny_llama, tiny_t5

from orthomerge.prompting import Asked, Wording, generate, log_likelihoods
from orthomerge.tasks import get_task, prompt_of
from orthomerge.tuning import text_fisher

TEXTS = [(text, None) for text in make_texts(5)]
CLASSES = prompt_of(
    get_task("topic"), {"prompt": "{text}\nIs:", "answers": [*list("abcde"), "not f"]}
)
NUMBERS = prompt_of(get_task("pleasantness"), "{text}\nIs:")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_classes_weigh_by_their_likelihood_and_padding_is_nothing(kind):
    tokenizer = tiny_language_tokenizer(seq2seq=kind == "t5")
    model = (tiny_t5 if kind == "t5" else tiny_llama)(len(tokenizer)).double()
    layer = {
        "llama": "model.layers.0.self_attn.q_proj",
        "t5": "decoder.block.1.layer.1.EncDecAttention.k",
    }[kind]
    wording = Wording.of(CLASSES, tokenizer, model.config)
    found = text_fisher(model.requires_grad_(False), wording, TEXTS, [layer], batch_size=3)
    weight = model.get_submodule(layer).weight.requires_grad_()
    wanted = torch.zeros_like(weight)
    for text in TEXTS:
        batch = wording.likelihood_batch([wording.encode(text, CLASSES.answers)])
        logs = log_likelihoods(model, batch).log_softmax(dim=-1)[0]
        for log in logs:
            (gradient,) = torch.autograd.grad(log, weight, retain_graph=True)
            wanted += log.detach().exp() * gradient.square() / len(TEXTS)
    assert wanted.max() > 0
    assert torch.allclose(found[layer], wanted, rtol=1e-4, atol=1e-9)  # norms run in float32


def test_a_number_is_drawn_from_the_model_under_a_seed():
    tokenizer = tiny_language_tokenizer()
    model = tiny_llama(len(tokenizer)).double().requires_grad_(False)
    layer = "model.layers.1.mlp.up_proj"
    wording = Wording.of(NUMBERS, tokenizer, model.config)
    one, two, other = (
        text_fisher(model, wording, TEXTS, [layer], batch_size=8, seed=s)[layer] for s in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    asked = sorted((wording.encode(t, []).prompt for t in TEXTS), key=len)
    drawn = generate(model, wording, asked, seed=0)
    weight = model.get_submodule(layer).weight.requires_grad_()
    wanted = torch.zeros_like(weight)
    for prompt, answer in zip(asked, drawn, strict=True):
        log = log_likelihoods(model, wording.likelihood_batch([Asked(prompt, [answer])]))
        wanted += torch.autograd.grad(log.sum(), weight)[0].square() / len(asked)
    assert torch.allclose(one, wanted, rtol=1e-4, atol=1e-9)  # norms run in float32
