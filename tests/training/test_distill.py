"""Distillation without labels: merged factors that answer as each adapter does alone."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import call, make_texts
from peft import PeftModel
from safetensors.torch import load_file
from small_adapters import make_adapter
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from orthomerge import distill_adapters, verify
from orthomerge.adapters import read_adapter
from orthomerge.errors import AdapterError, MergeError, OrthomergeError
from orthomerge.training import DistillSettings

LABELS = (2, 3, 1)
FAST = DistillSettings(steps=40, learning_rate=5e-3, seed=1)


@pytest.fixture
def parts(tiny_base, tmp_path):
    """Three adapters that disturb each other: two classifiers and a regression."""
    return [
        make_adapter(tmp_path / f"task{i}", tiny_base, i + 1, labels=labels, size=1.5)
        for i, labels in enumerate(LABELS)
    ]


@pytest.fixture
def texts():
    return [make_texts(60, seed) for seed in range(len(LABELS))]


def logits(base, folder, labels, texts, head=None):
    """What PEFT's own forward pass says."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    if head:
        model.load_state_dict(load_file(head), strict=False)
    model = PeftModel.from_pretrained(model, folder).eval()
    batch = AutoTokenizer.from_pretrained(base)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).logits


def divergence(teacher, student):
    if teacher.shape[1] == 1:
        return float(((teacher - student) ** 2).mean() / teacher.var())
    log = teacher.log_softmax(-1)
    return float((log.exp() * (log - student.log_softmax(-1))).sum(-1).mean())


def test_a_distilled_merge_is_nearer_to_the_adapters_by_peft_itself(
    parts, texts, tiny_base, tmp_path
):
    from orthomerge import merge_adapters

    done = distill_adapters(parts, texts, output=tmp_path / "out", settings=FAST)
    merge_adapters(parts, weights=done.scale, output=tmp_path / "sum")
    fresh = make_texts(40, 99)
    gains = []
    for part, labels in zip(parts, LABELS, strict=True):
        alone = logits(tiny_base, part, labels, fresh)
        far, near = (
            divergence(
                alone,
                logits(
                    tiny_base, tmp_path / name, labels, fresh,
                    tmp_path / name / "heads" / f"{part.name}.safetensors",
                ),
            )
            for name in ("sum", "out")
        )  # fmt: skip
        gains.append(near / far)
    assert sorted(gains)[1] < 1 and sum(gains) / len(gains) < 0.75, gains
    assert done.best.distance < done.measured[0].distance
    assert all(check.good for check in verify(tmp_path / "out"))


def test_one_adapter_at_weight_1_stays_itself(parts, texts, tmp_path):
    done = distill_adapters(parts[:1], texts[:1], weights=1.0, settings=FAST)
    assert done.best.step == 0
    assert done.best.distance < 1e-10
    for name, factors in read_adapter(parts[0]).layers.items():
        torch.testing.assert_close(done.merged.dense(name), factors.delta())


def test_passes_of_other_sizes_give_the_same_factors(parts, texts):
    short = DistillSettings(steps=4, rows_a_pass=1000)
    whole = distill_adapters(parts, texts, settings=short)
    cut = distill_adapters(parts, texts, settings=DistillSettings(steps=4, rows_a_pass=5))
    for name in whole.merged.layers:
        torch.testing.assert_close(
            cut.merged.dense(name), whole.merged.dense(name), rtol=1e-3, atol=1e-5
        )


def test_the_rank_is_what_was_asked_for(parts, texts, tmp_path):
    done = distill_adapters(parts, texts, rank=2, settings=FAST, output=tmp_path / "out")
    assert {f.rank for f in done.factors.values()} == {2}
    assert {f.rank for f in read_adapter(tmp_path / "out").layers.values()} == {2}
    chosen = distill_adapters(parts, texts, rank="auto", settings=DistillSettings(steps=1))
    assert {f.rank for f in chosen.factors.values()} <= {2, 4, 6}


def test_it_begins_from_a_merge_that_exists(parts, texts, tmp_path):
    from orthomerge import merge_adapters

    merge_adapters(parts, method="ties", weights=0.5, rank=4, output=tmp_path / "ties")
    done = distill_adapters(parts, texts, start=tmp_path / "ties", settings=FAST)
    assert {f.rank for f in done.factors.values()} == {4}
    assert done.best.distance < done.measured[0].distance
    assert done.scale == 1.0


def test_the_teachers_answers_are_kept_and_used(parts, texts, tmp_path, monkeypatch):
    settings = DistillSettings(steps=2)
    one = distill_adapters(parts, texts, settings=settings, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(parts)

    def never(*args, **kwargs):
        raise AssertionError("the teachers were asked again")

    monkeypatch.setattr("orthomerge.training.distillation.distill.teach", never)
    two = distill_adapters(parts, texts, settings=settings, cache=tmp_path / "cache")
    for name in one.merged.layers:
        assert one.merged.dense(name).equal(two.merged.dense(name))
    with pytest.raises(AssertionError):  # other texts are another question
        distill_adapters(parts, texts[::-1], settings=settings, cache=tmp_path / "cache")


def test_what_does_not_fit_is_refused(parts, texts, tmp_path, tiny_base):
    with pytest.raises(MergeError, match="for each adapter"):
        distill_adapters(parts, texts[:2])
    with pytest.raises(MergeError, match="leave out method"):
        distill_adapters(parts, texts, start=parts[0], weights=0.5)
    with pytest.raises(MergeError, match="rank 'small'"):
        distill_adapters(parts, texts, rank="small", settings=DistillSettings(steps=1))
    headless = make_adapter(tmp_path / "headless", tiny_base, 9)
    held = load_file(headless / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {k: v for k, v in held.items() if "classifier" not in k},
        headless / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="carries no head"):
        distill_adapters([parts[0], headless], texts[:2])


def test_the_command_writes_an_adapter_and_says_how_near_it_came(parts, texts, tmp_path):
    files = []
    for i, lines in enumerate(texts):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("\n".join(json.dumps({"text": t}) for t in lines))
    given = [x for f in files for x in ("--data", f)]
    said = json.loads(
        call("distill", *parts, *given, "--steps", 3, "--rank", 4, "--output", tmp_path / "out",
             "--json", "--quiet")
    )  # fmt: skip
    assert set(said["agreement"]) == {"task0", "task1", "task2"}
    assert said["measured"][0]["step"] == 0
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "distill"
    assert record["distilled"]["settings"]["steps"] == 3
    assert "agreement" in (tmp_path / "out" / "README.md").read_text()


def test_a_distillation_that_was_stopped_goes_on_to_the_same_factors(
    parts, texts, tmp_path, monkeypatch
):
    settings = DistillSettings(steps=12, evaluate_every=4, learning_rate=5e-3)
    whole = distill_adapters(parts, texts, output=tmp_path / "whole", settings=settings)

    class Stopped(BaseException):
        pass

    def stop(what, done, of, measured):
        if what == "training" and done == 10:
            raise Stopped

    with pytest.raises(Stopped):
        distill_adapters(parts, texts, output=tmp_path / "out", settings=settings, progress=stop)
    work = tmp_path / "out.distill"
    assert (work / "training" / "checkpoint-8" / "trainer_state.json").is_file()
    assert not (tmp_path / "out").exists()
    seen = []

    def never(*args, **kwargs):
        raise AssertionError("the teachers were asked again")

    monkeypatch.setattr("orthomerge.training.distillation.distill.teach", never)
    again = distill_adapters(
        parts, texts, output=tmp_path / "out", settings=settings,
        progress=lambda what, done, of, m: seen.append(done) if what == "training" else None,
    )  # fmt: skip
    assert seen == [9, 10, 11, 12]
    assert [m.step for m in again.measured] == [0, 4, 8, 12]
    assert again.measured == whole.measured
    for name in whole.factors:
        assert again.factors[name].A.equal(whole.factors[name].A)
        assert again.factors[name].B.equal(whole.factors[name].B)
    assert not work.exists()


def test_other_settings_begin_anew_and_nothing_of_the_users_is_removed(parts, texts, tmp_path):
    (tmp_path / "out.distill").mkdir()
    (tmp_path / "out.distill" / "mine.txt").write_text("mine")
    with pytest.raises(OrthomergeError, match=r"out\.distill"):
        distill_adapters(parts, texts, output=tmp_path / "out", settings=DistillSettings(steps=1))
    assert (tmp_path / "out.distill" / "mine.txt").read_text() == "mine"

    def stop(what, done, of, measured):
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill_adapters(
            parts, texts, output=tmp_path / "b", progress=stop,
            settings=DistillSettings(steps=4, evaluate_every=2),
        )  # fmt: skip
    done = distill_adapters(
        parts, texts, output=tmp_path / "b", settings=DistillSettings(steps=6, evaluate_every=2)
    )
    assert [m.step for m in done.measured] == [0, 2, 4, 6]
    fresh = distill_adapters(parts, texts, settings=DistillSettings(steps=6, evaluate_every=2))
    for name in fresh.factors:
        assert done.factors[name].A.equal(fresh.factors[name].A)


def test_patience_ends_a_training_that_gains_no_more(parts, texts):
    settings = DistillSettings(steps=50, evaluate_every=1, patience=2, learning_rate=10.0)
    done = distill_adapters(parts, texts, settings=settings)
    assert len(done.measured) == 3 and done.best.step == 0


def test_a_tenth_adapter_joins_a_merge_by_its_heads(parts, texts, tmp_path):
    distill_adapters(parts[:2], texts[:2], output=tmp_path / "two", settings=FAST)
    heads = [tmp_path / "two" / "heads" / f"{p.name}.safetensors" for p in parts[:2]]
    done = distill_adapters(
        [*heads, parts[2]], texts, weights=[1.0, 0.5], output=tmp_path / "three", settings=FAST
    )
    assert set(done.texts) == {"task0", "task1", "task2"}
    assert done.best.distance < done.measured[0].distance
    found = sorted(f.name for f in (tmp_path / "three" / "heads").iterdir())
    assert found == [f"task{i}.safetensors" for i in range(3)]
    assert all(check.good for check in verify(tmp_path / "three"))
    # Without the two's texts: the merge teaches both of its tasks on the third's.
    own = distill_adapters([tmp_path / "two", parts[2]], [texts[2], texts[2]], settings=FAST)
    assert set(own.texts) == {"task0", "task1", "task2"}
    record = json.loads((tmp_path / "three" / "merge.json").read_text())
    assert [a["weight"] for a in record["adapters"]] == [1.0, 1.0, 0.5]
