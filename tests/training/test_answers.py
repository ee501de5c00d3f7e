"""The loss of answers alone is the loss that the model itself takes of the whole batch."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_text import tiny_language_tokenizer

from orthomerge.prompting import IGNORED, Wording
from orthomerge.tasks import Row, get_task, prompt_of
from orthomerge.training.answers import AnswerTrainer

SIZE = {"vocab_size": 560, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZE | {"hidden_size": 32, "intermediate_size": 64}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**WIDE, num_key_value_heads=2)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=560, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE)),
}
ROWS = [Row("a good film", None, 1), Row("bad", None, 0), Row("a long dull story of war", None, 0)]


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_and_its_gradient_are_the_models_own(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    assert AnswerTrainer.fits(model)
    tokenizer = tiny_language_tokenizer()
    wording = Wording.of(prompt_of(get_task("sentiment")), tokenizer, model.config)
    batch = wording.collate(wording.examples(ROWS))
    trainer = AnswerTrainer(
        model=model, args=hf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    )
    items = (batch["labels"] != IGNORED).sum()

    def found(loss):
        model.zero_grad()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, gradients = found(model(**batch, num_items_in_batch=items).loss)
    for counted in (items, None):
        loss, ours = found(trainer.compute_loss(model, dict(batch), num_items_in_batch=counted))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for one, other in zip(ours, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_model_that_cannot_be_asked_for_some_logits_keeps_the_plain_trainer():
    config = hf.T5Config(vocab_size=560, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert not AnswerTrainer.fits(hf.T5ForConditionalGeneration(config))
