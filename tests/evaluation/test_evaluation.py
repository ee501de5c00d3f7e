"""Scores against scikit-learn's definitions, updates against PEFT's own forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_texts, tiny_bert
from peft import LoraConfig, get_peft_model

from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError
from orthomerge.evaluation.classification import Evaluator, applied, score
from orthomerge.factors import LoraFactors
from orthomerge.tasks import Row


def test_scores_of_a_small_case_by_hand():
    found = score("classification", np.array([1, 1, 0, 0, 1]), [1, 0, 0, 1, 1], 2)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    ranked = score("regression", np.array([1.0, 2.0, 4.0]), [0.0, 5.0, 6.0], 1)
    assert ranked["spearman"] == pytest.approx(1.0)
    assert ranked["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [0, 5, 6])[0, 1])


def test_a_constant_answer_orders_nothing_and_scores_zero():
    assert score("regression", np.full(4, 2.0), [1.0, 2.0, 3.0, 4.0], 1)["pearson_spearman"] == 0.0
    assert score("classification", np.zeros(4, int), [0, 1, 0, 1], 2)["matthews"] == 0.0


@pytest.mark.parametrize("labels", [1, 3])
def test_predictions_are_those_of_peft(tiny_base, tiny_tokenizer, tmp_path, labels):
    evaluator = Evaluator(str(tiny_base), tiny_tokenizer, max_length=32, batch_size=4)
    torch.manual_seed(3)
    base = tiny_bert(labels)
    base.bert.load_state_dict(tiny_bert().bert.state_dict())
    model = get_peft_model(
        base,
        LoraConfig(
            r=4, lora_alpha=64, target_modules=["query", "value"], init_lora_weights=False,
            task_type="SEQ_CLS",
        ),
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    texts = make_texts(11, 5)
    rows = [Row(t, None, 0) for t in texts]
    found = evaluator.predict(
        rows, adapter.layers, adapter.modules, num_labels=labels, regression=labels == 1
    )
    with torch.no_grad():
        logits = torch.cat([model(**tiny_tokenizer(t, return_tensors="pt")).logits for t in texts])
    if labels == 1:
        np.testing.assert_allclose(found, logits[:, 0].numpy(), atol=1e-5)
    else:
        assert found.tolist() == logits.argmax(-1).tolist()


def test_the_model_is_exactly_as_before_even_after_a_failure():
    model = tiny_bert()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    name = "bert.encoder.layer.0.attention.self.query"
    good = {name: LoraFactors(torch.randn(2, 32), torch.randn(32, 2))}
    with applied(model, good):
        assert not torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
    for bad, word in (
        ({**good, "bert.nowhere": good[name]}, "no layer 'bert.nowhere'"),
        ({**good, "bert.encoder.layer.1.attention.self.query": torch.zeros(3, 3)}, r"\[3, 3\]"),
    ):
        with pytest.raises(AdapterError, match=word), applied(model, bad):
            pass
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("head", "word"),
    [
        ({}, "carries no head"),
        ({"classifier.weight": torch.zeros(5, 32)}, "other labels"),
        ({"score.weight": torch.zeros(2, 32)}, "missing"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tiny_base, tiny_tokenizer, head, word):
    evaluator = Evaluator(str(tiny_base), tiny_tokenizer)
    with pytest.raises(AdapterError, match=word):
        evaluator.predict([Row("a film", None, 0)], {}, head, num_labels=2, regression=False)
