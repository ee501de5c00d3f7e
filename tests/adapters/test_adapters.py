"""Starts that PEFT loads, adapters read and written, merges on files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_texts, tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from orthomerge.adapters import (
    OsrmConfig,
    freeze_A,
    initialize_osrm_weights,
    lora_layers,
    merge_adapters,
    new_lora,
    read_adapter,
    save_start,
    unit_rows,
)
from orthomerge.errors import (
    AdapterError,
    MergeError,
    StatisticsError,
    SubspaceError,
    UnknownNameError,
)
from orthomerge.statistics import batches, collect_statistics
from orthomerge.subspace import list_solvers


def collected(tokenizer, granularity):
    """Statistics of four "tasks" of a few texts each."""
    return [
        collect_statistics(
            tiny_bert(),
            batches([(t, None) for t in make_texts(6, seed)], tokenizer),
            ["query", "value"],
            granularity=granularity,
        )
        for seed in range(4)
    ]


@pytest.fixture(scope="module")
def statistics(tiny_tokenizer):
    return collected(tiny_tokenizer, "token")


@pytest.fixture(scope="module")
def few_rows(tiny_tokenizer):
    """One row a sample, so that the others leave room in 32 dimensions."""
    return collected(tiny_tokenizer, "sample")


def lora(seed=0, **changes):
    options = {"targets": ["query", "value"], "rank": 4, "alpha": 8, "task_type": "SEQ_CLS"}
    return new_lora(tiny_bert(), seed=seed, **{**options, **changes})


def random_adapter(folder, seed, *, rank=4, model_name="base", **config):
    base = tiny_bert()
    torch.manual_seed(seed)  # after the base, which has a seed of its own
    model = get_peft_model(
        base,
        LoraConfig(
            r=rank, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False,
            task_type="SEQ_CLS", **config,
        ),
    )  # fmt: skip
    model.peft_config["default"].base_model_name_or_path = model_name
    model.save_pretrained(folder)
    return model.eval()


def peft_deltas(model):
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in lora_layers(model).items()
    }


@pytest.mark.parametrize("solver", [s.name for s in list_solvers()])
def test_every_start_is_orthonormal_and_says_nothing_yet(few_rows, solver):
    model = lora()
    config = OsrmConfig(solver=solver, granularity="sample")
    found = initialize_osrm_weights(model, few_rows[1:], few_rows[0], config)
    assert set(found) == set(lora_layers(model))
    for name, layer in lora_layers(model).items():
        A = layer.lora_A["default"].weight.detach().double()
        assert torch.linalg.matrix_norm(A @ A.T - torch.eye(4, dtype=torch.float64)) <= 1e-6
        torch.testing.assert_close(A, found[name].basis, atol=1e-7, rtol=0)
        assert not layer.lora_B["default"].weight.any()


def test_a_start_loads_with_peft_and_is_trainable(statistics, tmp_path):
    model = lora()
    initialize_osrm_weights(model, statistics[1:], statistics[0])
    save_start(model, tmp_path / "start")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "start", is_trainable=True)
    for name, layer in lora_layers(again).items():
        mine = lora_layers(model)[name]
        assert torch.equal(layer.lora_A["default"].weight, mine.lora_A["default"].weight)
        assert layer.lora_A["default"].weight.requires_grad
    head = again.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad
    freeze_A(again)
    trainable = [n for n, p in again.named_parameters() if p.requires_grad]
    assert trainable
    assert not any("lora_A" in n for n in trainable)


def test_unit_rows_have_norm_one_and_their_direction():
    model, same = lora(seed=5), lora(seed=5)
    unit_rows(model)
    for name, layer in lora_layers(model).items():
        A, before = layer.lora_A["default"].weight, lora_layers(same)[name].lora_A["default"].weight
        torch.testing.assert_close(A.norm(dim=1), torch.ones(4))
        torch.testing.assert_close(A, before / before.norm(dim=1, keepdim=True))


def test_statistics_that_do_not_belong_are_refused(statistics, tiny_tokenizer):
    with pytest.raises(StatisticsError, match="at least one other task"):
        initialize_osrm_weights(lora(), [])
    deep = new_lora(tiny_bert(layers=3), targets=["query"], rank=2, alpha=2)
    with pytest.raises(StatisticsError, match="another model"):
        initialize_osrm_weights(deep, statistics[:1])
    with pytest.raises(StatisticsError, match="--granularity sample"):
        initialize_osrm_weights(lora(), statistics[:1], config=OsrmConfig(granularity="sample"))
    with pytest.raises(StatisticsError, match="no statistics for layer"):
        initialize_osrm_weights(lora(targets=["dense"]), statistics[:1])
    with pytest.raises(SubspaceError, match="larger than the admissible subspace"):
        initialize_osrm_weights(lora(rank=31), statistics, config=OsrmConfig("null_space"))
    with pytest.raises(UnknownNameError, match="linear layers are"):
        lora(targets=["q_proj"])


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}}],
)
def test_an_adapter_is_read_with_its_true_scaling(tmp_path, config):
    model = random_adapter(tmp_path / "a", 1, **config)
    read = read_adapter(tmp_path / "a")
    expected = peft_deltas(model)
    assert len(read.layers) == len(expected) == 4
    for name, delta in expected.items():
        torch.testing.assert_close(read.layers[f"bert.{name}"].delta(), delta)
    assert set(read.modules) == {"classifier.weight", "classifier.bias"}
    if config.get("use_rslora"):
        assert read.layers["bert.encoder.layer.0.attention.self.query"].scaling == 8 / math.sqrt(4)


@pytest.mark.parametrize(("method", "rank"), [("linear", None), ("ties", None), ("svd", 5)])
def test_a_merged_folder_loads_in_peft_as_the_sum_it_says(tmp_path, method, rank):
    models = [random_adapter(tmp_path / n, i) for i, n in enumerate("abc")]
    options = {} if method == "linear" else {"density": 0.5} if method == "ties" else {}
    merged = merge_adapters(
        [tmp_path / n for n in "abc"], method=method, weights=[1, 0.5, -0.25], rank=rank,
        output=tmp_path / "m", **options,
    )  # fmt: skip
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "m").eval()
    for name, delta in peft_deltas(loaded).items():
        torch.testing.assert_close(delta, merged.dense(f"bert.{name}"), atol=1e-5, rtol=1e-4)
    if method == "linear":
        parts = [peft_deltas(m) for m in models]
        for name, delta in peft_deltas(loaded).items():
            expected = parts[0][name] + 0.5 * parts[1][name] - 0.25 * parts[2][name]
            torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
    record = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert [a["weight"] for a in record["adapters"]] == [1, 0.5, -0.25]
    assert all(len(a["sha256"]) == 64 for a in record["adapters"])
    head = load_file(tmp_path / "m" / "heads" / "b.safetensors")
    assert torch.equal(
        head["classifier.weight"], read_adapter(tmp_path / "b").modules["classifier.weight"]
    )
    assert "AutoModelForSequenceClassification" in (tmp_path / "m" / "README.md").read_text()


def test_bad_adapters_are_refused_in_a_sentence_and_nothing_is_written(tmp_path):
    random_adapter(tmp_path / "a", 1)
    random_adapter(tmp_path / "other", 2, model_name="another-base")
    random_adapter(tmp_path / "dora", 3, use_dora=True)
    (tmp_path / "pickled").mkdir()
    for name in ("adapter_config.json",):
        (tmp_path / "pickled" / name).write_text((tmp_path / "a" / name).read_text())
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"x")
    random_adapter(tmp_path / "cut", 4)
    weights = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    weights.pop(next(k for k in weights if "lora_B" in k))
    save_file(weights, tmp_path / "cut" / "adapter_model.safetensors")
    cases = {
        "other": "only adapters of one base",
        "dora": "DoRA",
        "pickled": "never read",
        "cut": "it was cut",
        "missing": "no adapter at",
    }
    for name, word in cases.items():
        with pytest.raises(AdapterError, match=word):
            merge_adapters([tmp_path / "a", tmp_path / name], output=tmp_path / "out")
    with pytest.raises(UnknownNameError, match="did you mean 'ties'"):
        merge_adapters([tmp_path / "a"], method="tie", output=tmp_path / "out")
    with pytest.raises(MergeError, match="2"):
        merge_adapters([tmp_path / "a"], weights=[1, 2], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
