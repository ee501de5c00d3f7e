"""AdaMerging: the gradient by finite differences, the descent, and the merge it says it made."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call, write_task
from small_adapters import make_adapter

from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, MergeError
from orthomerge.evaluation.classification import applied
from orthomerge.merging import merge_layers
from orthomerge.models.loading import load_classifier, load_tokenizer
from orthomerge.tuning import EntropySettings, minimise_entropy, read_inputs
from orthomerge.tuning.adamerging import Entropies


@pytest.fixture(scope="module")
def files(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entropy")
    for name, seed in (("a", 1), ("b", 2)):
        make_adapter(folder / name, tiny_base, seed)
        write_task(folder / f"{name}.jsonl", seed=seed + 5)
    return folder


def inputs_of(files, names="ab", rows=8):
    return read_inputs(
        [files / n for n in names], [str(files / f"{n}.jsonl") for n in names], rows=rows
    )


def test_the_entropy_is_that_of_the_merged_model(files):
    inputs = inputs_of(files)
    layers = inputs.layers
    torch.manual_seed(0)
    coefficients = torch.rand(len(layers), 2)
    merged = merge_layers(
        [a.layers for a in inputs.adapters],
        layer_weights={
            f"^{name}$": row.tolist() for name, row in zip(layers, coefficients, strict=True)
        },
    )
    found = Entropies(inputs, 48, 4).over_all(coefficients)
    tokenizer = load_tokenizer(inputs.base.path_or_id)
    for value, adapter, task in zip(found, inputs.adapters, inputs.tasks, strict=True):
        model = load_classifier(inputs.base.path_or_id, num_labels=2).eval()
        model.load_state_dict(adapter.modules, strict=False)
        batch = tokenizer([r.text for r in task.rows], padding=True, return_tensors="pt")
        with applied(model, merged.layers), torch.no_grad():
            p = model(**batch).logits.softmax(-1)
        assert value == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-5)


@pytest.mark.parametrize("names", ["a", "ab"])
def test_the_gradient_is_that_of_finite_differences(files, names):
    inputs = inputs_of(files, names)
    entropies = Entropies(inputs, 48, 8)
    coefficients = torch.full((1, len(names)), 0.3, requires_grad=True)
    entropies.descend(coefficients, [range(8)] * len(names))
    assert coefficients.grad is not None
    step = 1e-2
    for i in range(len(names)):
        ends = []
        for sign in (1, -1):
            moved = coefficients.detach().clone()
            moved[0, i] += sign * step
            ends.append(sum(entropies.over_all(moved)))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(coefficients.grad[0, i]) == pytest.approx(slope, rel=0.02, abs=1e-4)
    model = next(iter(entropies._models.values()))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("layerwise", [False, True])
def test_entropy_falls_and_a_seed_repeats_it(files, layerwise):
    inputs = inputs_of(files)
    settings = EntropySettings(
        steps=25, batch_size=4, learning_rate=0.02, layerwise=layerwise, seed=7
    )
    found = minimise_entropy(inputs, settings=settings)
    start = Entropies(inputs, 48, 8).over_all(torch.full((1, 2), 0.3))
    assert found.value == pytest.approx(sum(found.tasks) / 2)
    assert found.value < sum(start) / 2 - 1e-3
    assert found.trials[0].weights == pytest.approx([0.3, 0.3])
    assert len(found.layer_weights) == (len(inputs.layers) if layerwise else 0)
    torch.manual_seed(99)
    again = minimise_entropy(inputs, settings=settings)
    assert again.weights == found.weights
    assert again.layer_weights == found.layer_weights
    weights = found.layer_weights.values() if layerwise else [found.weights]
    assert all(0 <= w <= 1 for row in weights for w in row)


def test_the_command_writes_the_merge_of_its_coefficients(files, tmp_path):
    out = tmp_path / "out"
    arguments = [files / "a", files / "b", "--task", files / "a.jsonl", "--task",
                 files / "b.jsonl", "--rows", 8, "--objective", "entropy", "--layerwise",
                 "--steps", 3, "--batch-size", 4, "-o", out]  # fmt: skip
    assert "after 3 steps" in call("tune", *arguments)
    record = json.loads((out / "weights.json").read_text())
    read = [read_adapter(files / n) for n in "ab"]
    merged = merge_layers([a.layers for a in read], layer_weights=record["layer_weights"])
    written = read_adapter(out / "merged").layers
    assert set(record["layer_weights"]) == {f"^{n.replace('.', chr(92) + '.')}$" for n in written}
    for name, factors in written.items():
        torch.testing.assert_close(factors.delta(), merged.dense(name), atol=1e-6, rtol=1e-5)
    assert [t["metric"] for t in record["tasks"]] == ["entropy", "entropy"]
    assert "Coefficients by step" in (out / "trials.html").read_text()
    with pytest.raises(MergeError, match="not empty"):
        call("tune", *arguments)
    call("tune", *arguments, "--overwrite")


def test_what_has_no_entropy_is_refused_by_name(files, tiny_base, tmp_path):
    make_adapter(tmp_path / "v", tiny_base, 3, labels=1)
    task = write_task(tmp_path / "values.jsonl", regression=True)
    with pytest.raises(MergeError, match="task 'values' is a regression"):
        call("tune", files / "a", tmp_path / "v", "--task", files / "a.jsonl", "--task", task,
             "--rows", 5, "--objective", "entropy", "-o", tmp_path / "x")  # fmt: skip
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"steps": 0}, "steps 0"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"init": 2.0}, "from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, word):
    with pytest.raises(MergeError, match=word):
        EntropySettings(**values)


@pytest.mark.parametrize("objective", ["entropy", "validation"])
def test_heads_that_do_not_fit_are_refused(files, tiny_base, tmp_path, objective):
    make_adapter(tmp_path / "three", tiny_base, 3, labels=3)
    with pytest.raises(AdapterError, match="other labels"):
        call("tune", files / "a", tmp_path / "three", "--task", files / "a.jsonl", "--task",
             files / "b.jsonl", "--rows", 5, "--objective", objective, "--trials", 1,
             "-o", tmp_path / "x")  # fmt: skip
    assert not (tmp_path / "x").exists()
