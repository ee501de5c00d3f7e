from __future__ import annotations

import json

import pytest
from conftest import tiny_bert

from orthomerge.adapters import new_lora, read_adapter, save_start
from orthomerge.errors import OrthomergeError
from orthomerge.models import load_classifier
from orthomerge.tasks import Row
from orthomerge.training import TrainingSettings, train_adapter

ROWS = [Row("good film", None, 1), Row("bad dull film", None, 0)] * 12


def trained(tiny_base, tokenizer, folder, *, rows=ROWS, regression=False, rate=5e-3, **changes):
    labels = 1 if regression else 2
    save_start(
        new_lora(
            tiny_bert(labels), targets=["query", "value"], rank=2, alpha=4, task_type="SEQ_CLS"
        ),
        folder / "start",
    )
    output = folder / changes.pop("name", "out")
    train_adapter(
        load_classifier(str(tiny_base), num_labels=labels, regression=regression),
        folder / "start",
        rows,
        tokenizer,
        regression=regression,
        settings=TrainingSettings(learning_rate=rate, epochs=changes.pop("epochs", 8)),
        output=output,
        **changes,
    )
    return output


def test_training_lowers_the_loss_and_is_repeatable(tiny_base, tiny_tokenizer, tmp_path):
    one = trained(tiny_base, tiny_tokenizer, tmp_path, name="one", seed=3)
    two = trained(tiny_base, tiny_tokenizer, tmp_path, name="two", seed=3)
    losses = [v for _, v in json.loads((one / "training.json").read_text())["losses"]]
    assert len(losses) >= 1
    a, b = read_adapter(one), read_adapter(two)
    for name, factors in a.layers.items():
        assert factors.A.equal(b.layers[name].A)
        assert factors.B.equal(b.layers[name].B)
        assert factors.B.any()
    assert a.modules["classifier.weight"].equal(b.modules["classifier.weight"])


def test_a_regression_head_starts_at_a_mean_that_is_far_from_zero(
    tiny_base, tiny_tokenizer, tmp_path
):
    rows = [Row("good film", None, 4.0), Row("bad film", None, 5.0)] * 8
    far = trained(
        tiny_base, tiny_tokenizer, tmp_path, rows=rows, regression=True, rate=1e-6, epochs=1
    )
    bias = read_adapter(far).modules["classifier.bias"]
    assert float(bias) == pytest.approx(4.5, abs=1e-3)


def test_a_loss_that_is_not_finite_is_said_and_nothing_is_written(
    tiny_base, tiny_tokenizer, tmp_path
):
    rows = [Row("good film", None, float("inf")), Row("bad film", None, 1.0)] * 8
    with pytest.raises(OrthomergeError, match="lower the learning rate"):
        trained(tiny_base, tiny_tokenizer, tmp_path, rows=rows, regression=True)
    assert not (tmp_path / "out").exists()
