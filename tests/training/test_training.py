from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_bert

from orthomerge.adapters import Directions, lora_layers, new_lora, read_adapter, save_start
from orthomerge.errors import AdapterError, OrthomergeError, UnknownNameError
from orthomerge.models.loading import load_classifier
from orthomerge.subspace import orthonormal_rows
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


@pytest.mark.parametrize("within", [False, True])
def test_the_trainer_keeps_a_projected_start_on_its_side_at_every_step(
    tiny_base, tiny_tokenizer, tmp_path, within
):
    wrapped = new_lora(
        tiny_bert(), targets=["query", "value"], rank=2, alpha=4, task_type="SEQ_CLS"
    )
    g = torch.Generator().manual_seed(0)
    rows = {
        name: orthonormal_rows(torch.randn(16, 32, generator=g, dtype=torch.float64))
        for name in lora_layers(wrapped)
    }
    start = save_start(wrapped, tmp_path / "start", Directions(rows, within))
    model = load_classifier(str(tiny_base), num_labels=2)
    seen, moved = [], []

    def look(_done, _of):
        for name, layer in lora_layers(model).items():
            A = layer.lora_A["default"].weight.detach().double()
            inside = (A @ rows[name].T) @ rows[name]
            seen.append(float((A - inside if within else inside).norm()))
            moved.append(A)

    train_adapter(
        model, start, ROWS, tiny_tokenizer, regression=False, constraint="project",
        settings=TrainingSettings(learning_rate=2e-2, epochs=4), output=tmp_path / "out",
        progress=look,
    )  # fmt: skip
    assert len(seen) == 4 * 8  # 4 layers, 2 steps in each of 4 epochs
    assert max(seen) <= 1e-6
    assert float((moved[-1] - moved[3]).norm()) > 1e-3
    for name, factors in read_adapter(tmp_path / "out").layers.items():
        D = rows[name.removeprefix("bert.")]
        inside = (factors.A.double() @ D.T) @ D
        wrong = factors.A.double() - inside if within else inside
        assert float(wrong.norm()) <= 1e-6


def test_a_start_without_directions_cannot_be_trained_projected(
    tiny_base, tiny_tokenizer, tmp_path
):
    with pytest.raises(AdapterError, match="--constraint project"):
        trained(tiny_base, tiny_tokenizer, tmp_path, constraint="project")
    with pytest.raises(UnknownNameError, match="did you mean 'project'"):
        trained(tiny_base, tiny_tokenizer, tmp_path, constraint="projet")
    assert not (tmp_path / "out").exists()


def test_freeze_holds_a_bit_by_bit_and_init_does_not(tiny_base, tiny_tokenizer, tmp_path):
    free = trained(tiny_base, tiny_tokenizer, tmp_path, name="free", epochs=2)
    held = trained(tiny_base, tiny_tokenizer, tmp_path, name="held", epochs=2, constraint="freeze")
    start = read_adapter(tmp_path / "start")
    assert start.layers
    for name, factors in start.layers.items():
        assert torch.equal(read_adapter(held).layers[name].A, factors.A)
        assert not torch.equal(read_adapter(free).layers[name].A, factors.A)
        assert read_adapter(held).layers[name].B.any()


def test_an_adapter_names_its_base_and_no_path_of_this_machine(tiny_base, tiny_tokenizer, tmp_path):
    """The id a model is called by goes into the configuration and the card."""
    model = load_classifier(str(tiny_base), num_labels=2, name="org/tiny")
    save_start(
        new_lora(model, targets=["query"], rank=2, alpha=4, task_type="SEQ_CLS"), tmp_path / "s"
    )
    train_adapter(
        load_classifier(str(tiny_base), num_labels=2, name="org/tiny"), tmp_path / "s", ROWS,
        tiny_tokenizer, regression=False, settings=TrainingSettings(epochs=1),
        output=tmp_path / "out",
    )  # fmt: skip
    for folder in (tmp_path / "s", tmp_path / "out"):
        assert read_adapter(folder).base_model == "org/tiny"
        for file in folder.glob("*.[mj][ds]*"):
            assert str(tiny_base) not in file.read_text(), file
