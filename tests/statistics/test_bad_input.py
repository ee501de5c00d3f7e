"""What is wrong with data, model or file is said in one sentence, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch
from conftest import make_texts, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from orthomerge.errors import StatisticsError
from orthomerge.io.files import fingerprint
from orthomerge.moments import MeanMoment, Representation, RowMoment, SecondMoment, SketchMoment
from orthomerge.statistics import Statistics, StatisticsMeta, batches, collect_statistics

TEXTS = [(t, None) for t in make_texts(9)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["full", "rows", "sketch"])
@pytest.mark.parametrize("granularity", ["token", "sample", "task_mean"])
def test_activations_that_are_not_finite_name_layer_task_and_rows(
    tiny_tokenizer, value, kind, granularity
):
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = value
    with pytest.raises(StatisticsError) as caught:
        collect_statistics(
            model, batches(TEXTS, tiny_tokenizer), ["query"], granularity=granularity,
            representation=Representation(kind), task="reviews",
        )  # fmt: skip
    message = str(caught.value)
    rows = (
        9
        if granularity == "sample"
        else int(next(batches(TEXTS, tiny_tokenizer))["attention_mask"].sum())
    )
    assert message.startswith("task 'reviews', layer 'encoder.layer.1.attention.self.query': ")
    assert f"{rows} of {rows} feature rows hold NaN or infinity" in message
    assert "\n" not in message


def test_only_the_rows_that_are_not_finite_are_counted(tiny_tokenizer):
    model = tiny_bert().double()
    word = tiny_tokenizer.convert_tokens_to_ids("film")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[word] = float("nan")
    texts = [("good film", None), ("dark night", None)]
    with pytest.raises(StatisticsError, match="1 of 8 feature rows"):
        collect_statistics(model, batches(texts, tiny_tokenizer), ["query"])


def test_nothing_under_the_padding_is_read(tiny_tokenizer):
    """Padding full of NaN changes no statistics: it is selected away, not multiplied by zero."""
    model = tiny_bert().double()
    clean = {
        g: collect_statistics(model, batches(TEXTS, tiny_tokenizer), ["dense"], granularity=g)
        for g in ("token", "sample", "task_mean")
    }
    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(poison_padding)
    mask = next(batches(TEXTS, tiny_tokenizer))["attention_mask"].bool()
    poison_padding.mask = mask
    name = "encoder.layer.1.output.dense"
    for granularity, expected in clean.items():
        found = collect_statistics(
            model, batches(TEXTS, tiny_tokenizer), [name], granularity=granularity
        )
        torch.testing.assert_close(found.second_moment(name), expected.second_moment(name))


def poison_padding(_module, args):
    mask = poison_padding.mask
    if args[0].shape[:2] != mask.shape:  # the one sample of the discovery
        return None
    return (torch.where(mask[..., None], args[0], float("nan")),)


@pytest.mark.parametrize("granularity", ["token", "sample", "task_mean"])
@pytest.mark.parametrize("kind", ["full", "rows", "sketch"])
def test_nothing_but_padding_is_said(granularity, kind):
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(
        StatisticsError, match=r"task 'mine', layer '.*query'.*empty or all padding"
    ):
        collect_statistics(
            tiny_bert(), [batch], ["query"], granularity=granularity, task="mine",
            representation=Representation(kind),
        )  # fmt: skip


def test_a_text_of_nothing_but_padding_is_no_row(tiny_tokenizer):
    batch = next(batches(TEXTS, tiny_tokenizer))
    longer = {k: torch.cat([v, torch.zeros_like(v[:1])]) for k, v in batch.items()}
    a = collect_statistics(tiny_bert(), [batch], ["query"], granularity="sample")
    b = collect_statistics(tiny_bert(), [longer], ["query"], granularity="sample")
    name = next(iter(a.layers))
    assert b.moment(name).count == a.moment(name).count == 9
    torch.testing.assert_close(b.second_moment(name), a.second_moment(name))


@pytest.mark.parametrize("bad", [{"kind": "fll"}, {"rows": 0}, {"size": 0}, {"budget": 0}])
def test_a_bad_representation_is_refused(tiny_tokenizer, bad):
    with pytest.raises(StatisticsError):
        collect_statistics(
            tiny_bert(), batches(TEXTS, tiny_tokenizer), ["query"],
            representation=Representation(**bad),
        )  # fmt: skip


def meta(**changes) -> StatisticsMeta:
    known = {
        "model_id": "tiny", "config_hash": "c" * 64, "target_modules": ["a", "b"],
        "granularity": "token", "samples": 7, "model_revision": "r1", "model_sha256": "d" * 64,
        "tokenizer_hash": "e" * 64,
    }  # fmt: skip
    return StatisticsMeta(**{**known, **changes})


def one_of_each(dim: int = 5) -> Statistics:
    rows = torch.randn(7, dim, generator=torch.Generator().manual_seed(0))
    moments = {
        "full": SecondMoment(dim).update(rows),
        "rows": RowMoment(dim, 3).update(rows),
        "sketch": SketchMoment(dim, 2).update(rows),
        "mean": MeanMoment(dim).update(rows),
    }
    return Statistics(moments, {name: name for name in moments}, meta())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"config_hash": "0" * 64}, "model configuration"),
        ({"model_sha256": "0" * 64}, "model weights"),
        ({"model_revision": "r2"}, "model revision"),
        ({"tokenizer_hash": "0" * 64}, "tokenizer"),
        ({"target_modules": ["a"]}, "target modules"),
        ({"granularity": "sample"}, "granularity"),
    ],
)
def test_every_mismatch_is_refused_by_name(change, word):
    here = one_of_each()
    there = dataclasses.replace(here, meta=dataclasses.replace(here.meta, **change))
    for act in (lambda: here + there, lambda: here - there):
        with pytest.raises(StatisticsError, match=f"differ in their {word} ") as caught:
            act()
        assert "\n" not in str(caught.value)
        assert "collect one of them again" in str(caught.value)


def test_other_layers_are_refused():
    here = one_of_each()
    there = dataclasses.replace(here, layers={**here.layers, "more": "full"})
    with pytest.raises(StatisticsError, match="do not cover the same layers"):
        here + there


@cache
def written() -> bytes:
    """A file with one entry of each kind."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return one_of_each().save(Path(folder) / "a").read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("altered") / "a.stats.safetensors"


def read_or_refuse(path, lazy):
    """The statistics with all they hold, or None where a `StatisticsError` said what is wrong."""
    try:
        # The checker of annotations would read an entry itself and wrap what that raises.
        config.update("jaxtyping_disable", True)
        found = Statistics.load(path, lazy=lazy)
        return found, {lead: m.matrix for lead, m in found.moments.items()}
    except StatisticsError as problem:
        assert str(path) in str(problem)
        assert "\n" not in str(problem)
        return None
    finally:
        config.update("jaxtyping_disable", False)


def assert_as_written(found):
    expected = one_of_each()
    statistics, matrices = found
    assert statistics.meta == expected.meta
    assert statistics.layers == expected.layers
    for lead, matrix in matrices.items():
        torch.testing.assert_close(matrix, expected.moments[lead].matrix)
        assert statistics.moments[lead].count == expected.moments[lead].count
        assert statistics.moments[lead].slack == pytest.approx(expected.moments[lead].slack)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_cut_short_is_refused_at_every_length(path, lazy):
    whole = written()
    for length in [*range(64), *range(64, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert read_or_refuse(path, lazy) is None
    path.write_bytes(whole)
    assert_as_written(read_or_refuse(path, lazy))


@settings(deadline=None, max_examples=300)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(written()) - 1), st.integers(1, 255)), min_size=1, max_size=4
    ),
    lazy=st.booleans(),
)
def test_altered_bytes_are_noticed(path, changes, lazy):
    altered = bytearray(written())
    for position, flip in changes:
        altered[position] ^= flip
    path.write_bytes(altered)
    found = read_or_refuse(path, lazy)
    if found is not None:
        assert_as_written(found)


@settings(deadline=None, max_examples=50)
@given(tail=st.binary(min_size=1, max_size=40))
def test_bytes_behind_the_end_are_noticed(path, tail):
    path.write_bytes(written() + tail)
    assert read_or_refuse(path, False) is None


def test_what_was_never_collected_is_not_written(tmp_path):
    empty = Statistics({"a": SecondMoment(3)}, {"a": "a"}, meta())
    with pytest.raises(StatisticsError, match="no feature row"):
        empty.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_format_says_so(tmp_path):
    here = one_of_each()
    other = dataclasses.replace(here, meta=dataclasses.replace(here.meta, format=1))
    with pytest.raises(StatisticsError, match="has format 1, this version reads 3"):
        Statistics.load(other.save(tmp_path / "a"))


def forged(path, change):
    """The file with its metadata changed by somebody who can compute a hash."""
    path.unlink(missing_ok=True)  # another example's, altered: not replaced
    one_of_each().save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as stream:
        content = json.loads(stream.metadata()["orthomerge"])
    del content["sha256"]
    change(content)
    header = {"orthomerge": json.dumps({"sha256": fingerprint(content), **content})}
    save_file(tensors, path, metadata=header)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["meta"].pop("granularity"),
        lambda c: c["meta"].update(samples="many"),
        lambda c: c["meta"].update(target_modules=5),
        lambda c: c["meta"].update(tokenizer_hash=5),
        lambda c: c.update(meta=[]),
        lambda c: c.update(layers=[]),
        lambda c: c.update(layers={}),
        lambda c: c["layers"].update(x="nowhere"),
        lambda c: c.update(entries={}),
        lambda c: c["entries"]["full"].update(kind="rows"),
        lambda c: c["entries"]["full"].update(kind="pickle"),
        lambda c: c["entries"]["full"].update(count=0),
        lambda c: c["entries"]["full"].update(count="x"),
        lambda c: c["entries"]["full"].update(count=float("inf")),
        lambda c: c["entries"]["rows"].update(slack=float("nan")),
        lambda c: c["entries"]["sketch"].update(slack=-1.0),
        lambda c: c["entries"]["sketch"].update(size=1),
        lambda c: c["entries"]["sketch"].pop("size"),
        lambda c: c["entries"]["mean"].update(tokens=-1),
        lambda c: c["entries"].update(mean=5),
    ],
)
def test_a_forged_file_is_refused_in_a_sentence(path, change):
    assert read_or_refuse(forged(path, change), False) is None


def test_a_file_that_is_only_rewritten_is_read(path):
    assert_as_written(read_or_refuse(forged(path, lambda c: None), False))
