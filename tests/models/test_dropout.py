from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from orthomerge.models.modules import set_dropout

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "vocab_size": 20}  # fmt: skip
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.5)),
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES, attention_dropout=0.5)),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_without_dropout_a_model_in_training_says_what_it_says_in_evaluation(kind, attention):
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.set_attn_implementation(attention)
    tokens = torch.arange(12).view(2, 6)
    noisy = model.train()(input_ids=tokens).last_hidden_state
    expected = model.eval()(input_ids=tokens).last_hidden_state
    assert not torch.allclose(noisy, expected, atol=1e-3)
    set_dropout(model, 0.0)
    assert torch.allclose(model.train()(input_ids=tokens).last_hidden_state, expected, atol=1e-6)
