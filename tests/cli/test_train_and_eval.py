"""`train` and `eval`: which rows, how a task is asked, going on after a stop, bare models."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager

import pytest
import torch
from conftest import call, printed, tiny_bert, write_task
from huggingface_hub import ModelCard
from safetensors import safe_open
from tiny_text import LLAMA_TARGETS, easy_task, save_tiny
from transformers import AutoTokenizer, BertForSequenceClassification

from orthomerge.adapters import new_lora, read_adapter, save_start
from orthomerge.cli import _app
from orthomerge.errors import (
    AdapterError,
    MergeError,
    OutputError,
    RecipeError,
    TaskError,
    TrainingError,
)
from orthomerge.models.loading import load_for
from orthomerge.records import learnt_by
from orthomerge.tasks import get_task

WORDS = "{text}\nAnswer:"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_tokenizer):
    """A base, a start for two labels, training and test rows; and an adapter of all of the rows."""
    top = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    tiny_bert().save_pretrained(top / "base")
    tiny_tokenizer.save_pretrained(top / "base")
    model = load_for(str(top / "base"), "SEQ_CLS")
    lora = new_lora(model, targets=["query", "value"], rank=2, alpha=4, task_type="SEQ_CLS")
    save_start(lora, top / "start")
    write_task(top / "mine.jsonl", 40)
    write_task(top / "test.jsonl", 30, seed=1)
    call("train", top / "start", "--train-file", top / "mine.jsonl", "--epochs", 1, "--output",
         top / "whole")  # fmt: skip
    return top


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A decoder with a chat template, a start, a table, and an adapter asked in its own words."""
    top = tmp_path_factory.mktemp("writer")
    base = save_tiny(top / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    tokenizer.save_pretrained(base)
    model = load_for(str(base), "CAUSAL_LM")
    lora = new_lora(model, targets=LLAMA_TARGETS, rank=4, alpha=8, task_type="CAUSAL_LM")
    save_start(lora, top / "start")
    easy_task(top / "rows.jsonl", ("king", "queen"), 200)
    call("train", top / "start", "--train-file", top / "rows.jsonl", "--template", WORDS,
         "--max-length", 40, "--epochs", 1, "--output", top / "mine")  # fmt: skip
    return top


def test_a_training_file_is_taken_whole_and_not_scored(classifier):
    record = json.loads((classifier / "whole" / "training.json").read_text())
    assert record["rows"] == 40 and record["labels"] == ["a", "b"] and record["table"]["whole"]
    for way in ("--task", "--test-file"):
        with pytest.raises(TaskError, match="was trained on rows of"):
            call("eval", classifier / "whole", way, classifier / "mine.jsonl")
    # Another table is whole, whichever way it is named, and the line says so.
    for way in ("--task", "--test-file"):
        said = call("eval", classifier / "whole", way, classifier / "test.jsonl")
        assert "30 of 30 rows of test (the whole of test.jsonl; labels a, b)" in said


def test_a_table_named_as_a_task_is_split_once_and_the_same_way(classifier, tmp_path):
    told = printed("train", classifier / "start", "--task", classifier / "mine.jsonl", "--epochs",
                   1, "--output", tmp_path / "part", "--json")  # fmt: skip
    trained = json.loads(told)
    assert (
        trained["rows"] == trained["of"] < 40 and "a fixed split of mine.jsonl" in trained["what"]
    )
    part, table = tmp_path / "part", classifier / "mine.jsonl"
    scored = json.loads(printed("eval", part, "--task", table, "--json"))
    assert scored["rows"] == "the test split of mine.jsonl"
    assert scored["n"] + trained["rows"] == 40
    with pytest.raises(TaskError, match="scores its test split"):
        call("eval", part, "--test-file", table)


def test_a_test_file_may_lack_a_label_but_not_bring_one(classifier, tmp_path):
    rows = [json.loads(line) for line in (classifier / "test.jsonl").read_text().splitlines()]
    name = tmp_path / "mine.jsonl"  # the name of what was learnt
    name.write_text("\n".join(json.dumps({**r, "label": "c"}) for r in rows))
    with pytest.raises(TaskError, match="none of the task's: a, b"):
        call("eval", classifier / "whole", "--test-file", name)


def test_one_of_task_and_file_is_named(classifier, tmp_path):
    for named in ([], ["--task", "sentiment", "--train-file", classifier / "mine.jsonl"]):
        with pytest.raises(RecipeError, match="either --task or --train-file"):
            call("train", classifier / "start", *named, "--output", tmp_path / "out")
    with pytest.raises(TaskError, match="there is no file"):
        call("train", classifier / "start", "--train-file", "no.jsonl", "--output", tmp_path / "o")


def test_a_finished_adapter_is_replaced_only_when_told_to(classifier):
    again = ["train", classifier / "start", "--train-file", classifier / "mine.jsonl", "--output",
             classifier / "whole", "--epochs", 1]  # fmt: skip
    with pytest.raises(OutputError, match="--overwrite"):
        call(*again)
    before = read_adapter(classifier / "whole").sha256
    call(*again, "--overwrite")
    assert read_adapter(classifier / "whole").sha256 == before


def test_a_stopped_training_goes_on_with_the_same_command(classifier, monkeypatch):
    command = ["train", classifier / "start", "--train-file", classifier / "mine.jsonl", "--epochs",
               2, "--batch-size", 8, "--output"]  # fmt: skip
    call(*command, classifier / "through")

    @contextmanager
    def interrupted(description):
        yield lambda done, of: signal.raise_signal(signal.SIGINT) if done == 4 else None

    out = classifier / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("orthomerge.cli.train.work_bar", interrupted)
        with pytest.raises(_app._Stopped):
            call(*command, out)
    kept = classifier / "stopped.checkpoints"
    assert kept.is_dir() and not out.exists()
    with pytest.raises(TrainingError, match="another training"):
        call(*command, out, "--learning-rate", 1e-4)
    steps = []

    @contextmanager
    def counted(description):
        yield lambda done, of: steps.append(done)

    with monkeypatch.context() as patch:
        patch.setattr("orthomerge.cli.train.work_bar", counted)
        call(*command, out)
    assert steps[0] == 5 and steps[-1] == 10 and not kept.exists()
    assert read_adapter(out).sha256 == read_adapter(classifier / "through").sha256


def test_losses_are_said_and_what_learnt_nothing_is_warned_of(classifier, tmp_path):
    model = load_for(str(classifier / "base"), "SEQ_CLS")
    lora = new_lora(model, targets=["query", "value", "key", "dense"], rank=4, alpha=8,
                    task_type="SEQ_CLS")  # fmt: skip
    save_start(lora, tmp_path / "start")
    rows = easy_task(tmp_path / "rows.jsonl", ("king", "queen"), 200)
    command = ["train", tmp_path / "start", "--train-file", rows]
    said = call(*command, "--learning-rate", 1e-9, "--output", tmp_path / "nothing")
    assert "has not learnt the task" in said and "→ 0." in said
    told = printed(*command, "--learning-rate", 5e-3, "--epochs", 5, "--output", tmp_path / "much",
                   "--json")  # fmt: skip
    found = json.loads(told)
    assert found["learnt"] and found["loss"]["last"] < 0.9 * found["loss"]["constant"]


def test_a_classifier_is_scored_as_it_is(classifier, tmp_path):
    base, test = classifier / "base", classifier / "test.jsonl"
    found = json.loads(printed("eval", base, "--test-file", test, "--json"))
    model = BertForSequenceClassification.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    with torch.inference_mode():
        said = [int(model(**tokenizer(r["text"], return_tensors="pt")).logits.argmax())
                for r in rows]  # fmt: skip
    right = sum("ab"[s] == r["label"] for s, r in zip(said, rows, strict=True))
    assert found["metrics"]["accuracy"] == pytest.approx(right / len(rows))
    call("merge", classifier / "whole", "--method", "linear", "--save-as", "full", "--output",
         tmp_path / "full")  # fmt: skip
    full = json.loads(printed("eval", tmp_path / "full", "--test-file", test, "--head",
                              classifier / "whole", "--json"))  # fmt: skip
    alone = json.loads(printed("eval", classifier / "whole", "--test-file", test, "--json"))
    assert full["metrics"] == alone["metrics"]
    with pytest.raises(RecipeError, match="leave out --base"):
        call("eval", base, "--test-file", test, "--base", base)


def test_a_headless_encoder_says_what_it_lacks(tiny_base, classifier):
    with pytest.raises(AdapterError, match="without a head"):
        call("eval", tiny_base, "--test-file", classifier / "test.jsonl")


def test_how_an_adapter_is_asked_travels_with_it_and_with_its_merge(writer, tmp_path):
    (learnt,) = learnt_by(writer / "mine")
    assert learnt.form == "text" and learnt.max_length == 40 and learnt.prompt is not None
    test = easy_task(tmp_path / "rows.jsonl", ("king", "queen"), 60, seed=3)
    call("merge", writer / "mine", "--method", "linear", "--output", tmp_path / "merged")
    call("merge", writer / "mine", "--method", "linear", "--save-as", "full", "--output",
         tmp_path / "full")  # fmt: skip
    assert learnt_by(tmp_path / "merged") == learnt_by(tmp_path / "full") == [learnt]
    told = ("--form", "text", "--template", WORDS, "--max-length", 40)
    scores = [
        json.loads(printed("eval", subject, "--test-file", test, "--json", *more))
        for subject in (writer / "mine", tmp_path / "merged", tmp_path / "full")
        for more in ((), told)
    ]
    assert all(s["metrics"] == scores[0]["metrics"] and s["form"] == "text" for s in scores)
    said = call("eval", writer / "mine", "--test-file", test, "--template", "{text}?")
    assert "in other words than the adapter was trained with" in said
    bare = json.loads(printed("eval", writer / "base", "--test-file", test, "--template", WORDS,
                              "--json"))  # fmt: skip
    assert bare["form"] == "text" and bare["n"] == 60
    # Fisher information is of the same prompt.
    call("stats", "fisher", writer / "mine", "--task", writer / "rows.jsonl", "--samples", 8,
         "--output", tmp_path / "f.safetensors")  # fmt: skip
    from orthomerge.fisher import load_fisher

    assert load_fisher(tmp_path / "f.safetensors").meta.prompt == learnt.prompt.fingerprint


def test_a_trained_adapter_has_a_card_of_its_own(writer, classifier):
    card = ModelCard.load(writer / "mine" / "README.md")
    for words in (
        "# LoRA adapter: rows",
        WORDS,
        "`no`, `yes`",
        "40 tokens",
        "AutoModelForCausalLM",
    ):
        assert words in card.text
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    text = (classifier / "whole" / "README.md").read_text()
    assert "a, b" in text and "num_labels=2" in text and "trained for the task mine" in text
    call("verify", writer / "mine")


def test_a_chat_is_trained_and_scored_as_one(writer, tmp_path):
    rows = writer / "rows.jsonl"
    call("train", writer / "start", "--train-file", rows, "--chat", "--template", WORDS, "--epochs",
         1, "--rows", 60, "--output", tmp_path / "chat")  # fmt: skip
    (learnt,) = learnt_by(tmp_path / "chat")
    assert learnt.prompt is not None and learnt.prompt.chat
    test = easy_task(tmp_path / "rows.jsonl", ("king", "queen"), 40, seed=3)
    own, said = (
        json.loads(printed("eval", tmp_path / "chat", "--test-file", test, "--json", *more))
        for more in ((), ("--chat", "--template", WORDS))
    )
    assert own["metrics"] == said["metrics"]
    with pytest.raises(RecipeError, match="add --form text"):
        call("train", writer / "start", "--train-file", rows, "--chat", "--form", "classifier",
             "--output", tmp_path / "no")  # fmt: skip


def test_a_classifiers_adapter_is_not_merged_with_a_language_models(writer, classifier, tmp_path):
    with pytest.raises(AdapterError, match="no model is both"):
        call("merge", classifier / "whole", writer / "mine", "--output", tmp_path / "merged")
    with pytest.raises(AdapterError, match="no model is both"):
        call("diagnose", classifier / "whole", writer / "mine")


def test_distill_asks_each_adapter_as_it_was_trained(writer, tmp_path):
    rows = writer / "rows.jsonl"
    call("train", writer / "start", "--train-file", rows, "--chat", "--rows", 40, "--epochs", 1,
         "--output", tmp_path / "chat")  # fmt: skip
    data = ("--data", rows, "--data", rows)
    both = ("distill", writer / "mine", tmp_path / "chat", *data, "--samples", 6)

    def asked(*how):
        call(*both, "--steps", 1, "--cache", tmp_path / f"cache{how}", *how, "--overwrite",
             "--output", tmp_path / "out")  # fmt: skip
        tokenizer, found = AutoTokenizer.from_pretrained(writer / "base"), []
        for file in sorted((tmp_path / f"cache{how}").glob("*.safetensors")):
            with safe_open(file, framework="pt") as kept:
                example = json.loads(kept.metadata()["examples"])[0]
            ids = example["input_ids"][: example["asked"]]
            found.append((tokenizer.decode(ids), len(ids)))
        return found

    chat, mine = asked()  # by name
    words = get_task(str(rows)).labels
    assert mine[0].endswith("\nAnswer") and not any(word in mine[0] for word in words)
    assert mine[1] <= 40 and "</s>" in chat[0] and "</s>" not in mine[0]
    assert all(word in chat[0] for word in words)  # a table's own prompt lists its answers
    assert all("</s>" in text for text, _ in asked("--chat"))
    with pytest.raises(MergeError, match="--template asks tasks"):
        call(*both, "--template", WORDS, "--output", tmp_path / "none")
