"""A merge layer after layer on texts, against a dense reference: RegMean++ and RegMean."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call, make_texts
from small_adapters import make_adapter
from transformers import AutoModel, AutoTokenizer

from orthomerge import distill_adapters, merge_adapters, verify
from orthomerge.adapters import read_adapter
from orthomerge.errors import MergeError
from orthomerge.models.modules import layer_of
from orthomerge.statistics import collect_statistics
from orthomerge.training import DistillSettings

ONLY = DistillSettings(steps=0, held_out=0.0)
ALPHA, RIDGE = 0.7, 1e-3


@pytest.fixture
def parts(tiny_base, tmp_path):
    return [make_adapter(tmp_path / f"task{i}", tiny_base, i + 1, size=1.5) for i in range(3)]


@pytest.fixture
def texts():
    return [make_texts(20, seed) for seed in range(3)]


def reference(base, parts, texts, *, layer_wise):
    """Dense float64, from the paper: base weights with the layers merged so far written in."""
    read = [read_adapter(part).layers for part in parts]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModel.from_pretrained(base).double().eval()
    plain = AutoModel.from_pretrained(base).double().eval()
    names = sorted(read[0], key=lambda n: (int(n.split("layer.")[1].split(".")[0]), n))
    found = {}
    for name in names:
        runs = model if layer_wise else plain
        grams = []
        for mine in texts:
            seen: list[torch.Tensor] = []
            module = layer_of(runs, name.removeprefix("bert."))
            handle = module.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0][0]))
            for text in mine:  # one by one: no padding
                with torch.no_grad():
                    runs(**tokenizer(text, truncation=True, max_length=48, return_tensors="pt"))
            handle.remove()
            rows = torch.cat(seen)
            moment = rows.T @ rows / len(rows)
            gram = ALPHA * moment + (1 - ALPHA) * moment.diag().diag()
            grams.append(gram + RIDGE * gram.diag().mean() * torch.eye(len(gram)).double())
        deltas = [each[name].delta().double() for each in read]
        top = sum(d @ g for d, g in zip(deltas, grams, strict=True))
        found[name] = torch.linalg.solve(sum(grams), top, left=False)
        with torch.no_grad():
            layer_of(model, name.removeprefix("bert.")).weight += found[name]
    return found


@pytest.mark.parametrize("layer_wise", [True, False])
def test_it_is_the_dense_solution_on_the_inputs_of_the_layers_merged_so_far(
    parts, texts, tiny_base, layer_wise
):
    found = distill_adapters(
        parts, texts, method="regmean", weights=1.0, layer_wise=layer_wise, settings=ONLY,
        alpha=ALPHA, ridge=RIDGE,
    )  # fmt: skip
    wanted = reference(tiny_base, parts, texts, layer_wise=layer_wise)
    other = reference(tiny_base, parts, texts, layer_wise=not layer_wise)
    assert [m.step for m in found.measured] == [0] and found.losses == []
    last = max(wanted)
    assert (wanted[last] - other[last]).norm() > 1e-2 * wanted[last].norm()
    for name, delta in wanted.items():
        error = (found.merged.dense(name).double() - delta).norm() / delta.norm()
        assert error < 1e-4, (name, float(error))


def test_without_it_it_is_the_merge_from_statistics_of_the_same_texts(parts, texts, tiny_base):
    model, tokenizer = (
        AutoModel.from_pretrained(tiny_base),
        AutoTokenizer.from_pretrained(tiny_base),
    )
    statistics = [
        collect_statistics(
            model, [tokenizer(mine, padding=True, return_tensors="pt")], ["query", "value"]
        )
        for mine in texts
    ]
    merged = merge_adapters(parts, method="regmean", weights=1.0, statistics=statistics)
    found = distill_adapters(parts, texts, method="regmean", weights=1.0, settings=ONLY)
    for name in merged.layers:
        torch.testing.assert_close(
            found.merged.dense(name), merged.dense(name), rtol=1e-3, atol=1e-5
        )


def test_training_goes_on_from_it_and_the_record_says_so(parts, texts, tmp_path):
    settings = DistillSettings(steps=20, learning_rate=5e-3)
    done = distill_adapters(
        parts, texts, method="regmean", layer_wise=True, rank=4, settings=settings,
        output=tmp_path / "out",
    )  # fmt: skip
    assert done.best.distance < done.measured[0].distance
    assert {f.rank for f in done.factors.values()} == {4}
    assert all(check.good for check in verify(tmp_path / "out"))


def test_what_has_no_layer_wise_form_is_refused(parts, texts, tmp_path):
    with pytest.raises(MergeError, match="not merged layer by layer"):
        distill_adapters(parts, texts, layer_wise=True, settings=ONLY)
    merge_adapters(parts, output=tmp_path / "sum")
    with pytest.raises(MergeError, match="a start is a merge already"):
        distill_adapters(parts, texts, start=tmp_path / "sum", layer_wise=True, settings=ONLY)


def test_the_command(parts, texts, tmp_path):
    data = []
    for name, mine in zip("abc", texts, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in mine))
        data += ["--data", tmp_path / f"{name}.jsonl"]
    call("distill", *parts, *data, "--method", "regmean", "--layer-wise", "--steps", 0,
         "--output", tmp_path / "merged")  # fmt: skip
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())["distilled"]
    assert record["from"]["layer_wise"] and record["best"] == 0
    # A further adapter joins, with the texts of the three and without.
    heads = sorted((tmp_path / "merged" / "heads").iterdir())
    call("distill", *heads[:2], parts[2], *data, "--steps", 2, "--output", tmp_path / "more")
    assert len(list((tmp_path / "more" / "heads").iterdir())) == 3
