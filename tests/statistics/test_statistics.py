"""Streaming statistics against a dense float64 reference."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import make_texts, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from orthomerge.errors import StatisticsError, UnknownNameError
from orthomerge.io.files import fingerprint
from orthomerge.io.sealed import digest
from orthomerge.moments import SecondMoment
from orthomerge.statistics import (
    Statistics,
    StatisticsMeta,
    batches,
    collect_statistics,
    combined_moment,
    read_texts,
    sample_texts,
    target_layers,
)

TEXTS = [(t, None) for t in make_texts(23)]
TARGETS = ["query", "key", "value"]


def dense_reference(model, tokenizer, granularity):
    """Rows of every layer's input, one text at a time, so that there is no padding at all."""
    rows: dict[str, list[torch.Tensor]] = {}
    for text, _ in TEXTS:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(
                lambda _m, args, name=name, seen=seen: seen.update({name: args[0][0].double()})
            )
            for name, layer in target_layers(model, TARGETS).items()
        ]
        with torch.no_grad():
            model.base_model(**tokenizer(text, return_tensors="pt"))
        for handle in handles:
            handle.remove()
        for name, h in seen.items():
            kept = h.mean(0, keepdim=True) if granularity == "sample" else h
            rows.setdefault(name, []).append(kept)
    stacked = {n: torch.cat(r) for n, r in rows.items()}
    if granularity == "task_mean":
        stacked = {n: r.mean(0, keepdim=True) for n, r in stacked.items()}
    return {n: r.T @ r / len(r) for n, r in stacked.items()}


@pytest.mark.parametrize("granularity", ["token", "sample", "task_mean"])
@pytest.mark.parametrize(("batch_size", "side"), [(1, "right"), (4, "left"), (23, "right")])
def test_statistics_equal_the_dense_reference(tiny_tokenizer, granularity, batch_size, side):
    model = tiny_bert().double()
    expected = dense_reference(model, tiny_tokenizer, granularity)
    found = collect_statistics(
        model, padded_on(side, batches(TEXTS, tiny_tokenizer, batch_size=batch_size)), TARGETS,
        granularity=granularity,
    )  # fmt: skip
    assert set(found.layers) == set(expected)
    for name, reference in expected.items():
        error = torch.linalg.matrix_norm(found.second_moment(name) - reference)
        assert error <= 1e-10 * torch.linalg.matrix_norm(reference)


def padded_on(side, stream):
    for batch in stream:
        if side == "left":
            gaps = (1 - batch["attention_mask"]).sum(1).tolist()
            batch = {
                k: torch.stack([row.roll(gap) for row, gap in zip(v, gaps, strict=True)])
                for k, v in batch.items()
            }
        yield batch


def test_batches_pad_on_the_right_whatever_the_tokenizer_prefers(tiny_tokenizer):
    tiny_tokenizer.padding_side = "left"
    try:
        batch = next(batches(TEXTS, tiny_tokenizer))
    finally:
        tiny_tokenizer.padding_side = "right"
    assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())


def test_layers_that_read_one_tensor_share_one_entry(tiny_tokenizer):
    found = collect_statistics(tiny_bert(), batches(TEXTS, tiny_tokenizer), [*TARGETS, "dense"])
    per_block = {owner for layer, owner in found.layers.items() if "layer.0" in layer}
    assert len(per_block) == 4  # q/k/v; attention output; intermediate; output
    assert found.layers["encoder.layer.1.attention.self.value"].endswith("self.query")


def test_collection_leaves_no_trace(tiny_tokenizer):
    model = tiny_bert().train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    collect_statistics(model, batches(TEXTS, tiny_tokenizer), TARGETS)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_failing_forward_leaves_no_trace(tiny_tokenizer):
    model = tiny_bert().train()

    def broken():
        yield from batches(TEXTS[:4], tiny_tokenizer)
        yield {"input_ids": torch.full((1, 3), 10**6), "attention_mask": torch.ones(1, 3)}

    with pytest.raises(IndexError):
        collect_statistics(model, broken(), TARGETS)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_peft_model_is_measured_with_its_adapter_off(tiny_tokenizer):
    plain = collect_statistics(tiny_bert(), batches(TEXTS, tiny_tokenizer), ["query"])
    wrapped = get_peft_model(
        tiny_bert(), LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    )
    adapted = collect_statistics(wrapped, batches(TEXTS, tiny_tokenizer), ["query"])
    assert adapted.layers == plain.layers
    for name in plain.layers:
        torch.testing.assert_close(adapted.second_moment(name), plain.second_moment(name))


def test_the_file_brings_everything_back(tiny_tokenizer, tmp_path):
    found = collect_statistics(
        tiny_bert(), batches(TEXTS, tiny_tokenizer), TARGETS, model_id="tiny", model_sha256="ab"
    )
    read = Statistics.load(found.save(tmp_path / "a.stats.safetensors"))
    assert read.meta == found.meta
    assert read.meta.samples == len(TEXTS)
    assert read.layers == found.layers
    for key, m in found.moments.items():
        torch.testing.assert_close(read.moments[key].matrix, m.matrix, rtol=0, atol=0)
        assert read.moments[key].count == m.count


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 39), max_size=5))
def test_a_moment_does_not_depend_on_how_rows_were_split(cuts):
    h = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    edges = [0, *sorted(set(cuts)), 40]
    moment, total = SecondMoment(6), SecondMoment(6)
    for a, b in itertools.pairwise(edges):
        assert moment.update(h[a:b]) is moment
        total = total + SecondMoment(6).update(h[a:b])
    reference = h.double().T @ h.double() / 40
    torch.testing.assert_close(moment.matrix, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.matrix, reference, rtol=1e-12, atol=0)
    assert moment.count == total.count == 40


def test_combined_moments_are_weighted_means(tiny_tokenizer):
    a = collect_statistics(tiny_bert(), batches(TEXTS[:9], tiny_tokenizer), ["query"])
    b = collect_statistics(tiny_bert(), batches(TEXTS[9:], tiny_tokenizer), ["query"])
    name = next(iter(a.layers))
    expected = 0.75 * a.second_moment(name) + 0.25 * b.second_moment(name)
    torch.testing.assert_close(combined_moment([a, b], name, [3.0, 1.0]).matrix, expected)


def test_an_unknown_target_names_the_models_linear_layers(tiny_tokenizer):
    with pytest.raises(UnknownNameError, match=r"'quer'.*did you mean 'query'.*self\.value"):
        collect_statistics(tiny_bert(), batches(TEXTS, tiny_tokenizer), ["quer"])


def test_what_cannot_be_measured_is_said(tiny_tokenizer, tmp_path):
    with pytest.raises(StatisticsError, match="no sample"):
        collect_statistics(tiny_bert(), [], ["query"])
    broken = tiny_bert()
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(StatisticsError, match="NaN"):
        collect_statistics(broken, batches(TEXTS, tiny_tokenizer), ["query"])
    with pytest.raises(StatisticsError, match="did you mean 'token'"):
        collect_statistics(
            tiny_bert(), batches(TEXTS, tiny_tokenizer), ["query"], granularity="tokens"
        )
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(StatisticsError, match="cannot be read"):
        Statistics.load(tmp_path / "x")
    with pytest.raises(StatisticsError, match="no statistics file"):
        Statistics.load(tmp_path / "y")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"config_hash": "0"}, "model"),
        ({"target_modules": ["key"]}, "target modules"),
        ({"granularity": "sample"}, "granularity"),
    ],
)
def test_statistics_of_something_else_are_refused(tiny_tokenizer, change, word):
    found = collect_statistics(tiny_bert(), batches(TEXTS, tiny_tokenizer), ["query"])
    other = dataclasses.replace(found, meta=dataclasses.replace(found.meta, **change))
    with pytest.raises(StatisticsError, match=word):
        found.require_match(other, mine="a", theirs="b")


def test_texts_are_read_from_tables(tmp_path):
    import pandas

    frame = pandas.DataFrame({"sentence": ["one two", "three", None], "second": ["x", "y", "z"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for name in ("a.csv", "a.jsonl"):
        got = read_texts(tmp_path / name, text_column="sentence", pair_column="second")
        assert got == [("one two", "x"), ("three", "y")]
    (tmp_path / "b.tsv").write_text("text\tother\nNA\t1\nnull\t2\n\t3\n")
    assert read_texts(tmp_path / "b.tsv") == [("NA", None), ("null", None)]  # words, not gaps
    with pytest.raises(UnknownNameError, match="did you mean 'sentence'"):
        read_texts(tmp_path / "a.csv", text_column="sentnce")
    with pytest.raises(StatisticsError, match="there is no file"):
        read_texts(tmp_path / "b.csv")


def test_a_sample_is_seeded_and_without_repeats():
    texts = [(str(i), None) for i in range(50)]
    assert sample_texts(texts, 10, 1) == sample_texts(texts, 10, 1) != sample_texts(texts, 10, 2)
    assert len(set(sample_texts(texts, 10, 1))) == 10
    assert len(sample_texts(texts, 100, 1)) == 50


def test_a_pass_ends_when_everything_is_read_and_leaves_the_model_whole(tiny_tokenizer):
    model = tiny_bert(layers=3)
    data = list(batches(TEXTS, tiny_tokenizer, batch_size=8))
    with torch.no_grad():
        before = model(**data[0]).logits
    ran = []
    last = model.bert.encoder.layer[-1].output.dense
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    found = collect_statistics(model, data, ["query", "value"])
    # Only the small pass that tells which layers read one tensor goes to the end.
    assert len(ran) == 1 < len(data)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(model(**data[0]).logits, before, rtol=0, atol=0)
    assert found.meta.samples == len(TEXTS)


def test_a_file_holds_the_triangle_of_a_full_moment_and_older_files_are_read(tmp_path):
    """The same moment to the last bit, in half the bytes; format 2 held the whole matrix."""
    torch.manual_seed(0)
    rows = torch.randn(90, 24)
    moment = SecondMoment(24).update(rows)
    meta = StatisticsMeta("m", "c", ["a"], "token", 90)
    whole = Statistics({"a": moment}, {"a": "a"}, meta)
    whole.save(tmp_path / "new.st")
    assert load_file(tmp_path / "new.st")["a:triangle"].shape == (24 * 25 // 2,)
    assert torch.equal(Statistics.load(tmp_path / "new.st").second_moment("a"), moment.matrix)
    held, values = moment.state()
    entry = {"kind": "full", **values, "sha256": digest(held)}
    content = {"format": 2, "meta": {**dataclasses.asdict(meta), "format": 2}, "layers": {"a": "a"},
               "entries": {"a": entry}}  # fmt: skip
    header = {"orthomerge": json.dumps({"sha256": fingerprint(content), **content})}
    save_file({"a:matrix": moment.matrix.contiguous()}, tmp_path / "old.st", header)
    old = Statistics.load(tmp_path / "old.st")
    assert torch.equal(old.second_moment("a"), moment.matrix)
    assert (old + whole).meta.samples == 180
    old.save(tmp_path / "again.st")
    assert (tmp_path / "again.st").read_bytes() == (tmp_path / "new.st").read_bytes()
