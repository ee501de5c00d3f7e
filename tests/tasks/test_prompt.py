"""A task in words: what is asked, what is answered, and what of a user's template is refused."""

from __future__ import annotations

import pytest
from conftest import write_task
from hypothesis import given
from hypothesis import strategies as st

from orthomerge.errors import TaskError, UnknownNameError
from orthomerge.tasks import Prompt, from_file, get_task, list_tasks, number_or_mean, prompt_of
from orthomerge.tasks.templates import TEMPLATES

SENTIMENT = get_task("sentiment")
SIMILARITY = get_task("similarity")


def test_every_task_that_comes_along_has_a_template_of_its_own_that_fits_it():
    assert {t.name for t in list_tasks()} == set(TEMPLATES)


@pytest.mark.parametrize("task", list_tasks(), ids=lambda t: t.name)
def test_a_prompt_holds_its_texts_and_the_answers_it_asks_for(task):
    prompt = prompt_of(task)
    asked = prompt.ask("one {text} %s", "two }" if task.pair else None)
    assert "one {text} %s" in asked
    assert ("two }" in asked) == task.pair
    assert prompt.regression == (task.kind == "regression")
    assert len(prompt.answers) == len(task.labels)
    for label, said in enumerate(prompt.answers):
        assert said in asked or said.lower() in asked.lower()
        assert prompt.answer(label) == said
        assert prompt.read(f"  {said.upper()}.\nmore") == label
    assert prompt.read("") is None


@given(st.floats(-99, 99))
def test_a_number_is_read_as_it_is_written_to_one_decimal(value):
    prompt = prompt_of(SIMILARITY)
    said = prompt.answer(value)
    assert len(said.split(".")[1]) == 1
    assert said != "-0.0"
    assert prompt.read(f"{said} or so") == pytest.approx(value, abs=0.05 + 1e-9)


def test_a_part_of_a_task_is_asked_as_the_whole():
    assert prompt_of(get_task("sentiment@1/2")) == prompt_of(SENTIMENT)


def test_a_table_of_the_users_is_asked_by_its_columns(tmp_path):
    task = from_file(write_task(tmp_path / "mine.jsonl"))
    assert prompt_of(task).ask("x") == "Text: x\nAnswer with one of: a or b.\nAnswer:"
    number = from_file(write_task(tmp_path / "n.jsonl", regression=True))
    assert prompt_of(number).ask("x") == "Text: x\nAnswer with a number.\nAnswer:"


def test_answers_that_begin_one_another_are_ended_so_that_the_longer_can_be_chosen():
    prompt = prompt_of(SENTIMENT, {"prompt": "{text}", "answers": ["fresh", "fresher"]})
    assert prompt.answers == ("fresh.", "fresher.")
    assert prompt.read("Fresher") == 1


def test_a_template_can_come_from_a_file_of_text_or_yaml(tmp_path):
    (tmp_path / "t.txt").write_text("Say {answers}: {text} =>\n")
    assert prompt_of(SENTIMENT, str(tmp_path / "t.txt")).ask("x") == "Say rotten or fresh: x =>"
    (tmp_path / "t.yaml").write_text("prompt: '{text}?'\nanswers: {fresh: good}\n")
    prompt = prompt_of(SENTIMENT, str(tmp_path / "t.yaml"))
    assert (prompt.ask("x"), prompt.answers) == ("x?", ("rotten", "good"))


@pytest.mark.parametrize(
    ("task", "template", "message"),
    [
        ("sentiment", "{txt}", "unknown placeholder 'txt'.*did you mean 'text'.*valid: text, pair"),
        ("sentiment", "no text", "has no {text}"),
        ("similarity", "{text}", "has no {pair}, which the task 'similarity' needs"),
        ("sentiment", "{text} {pair}", "names {pair}, but"),
        ("sentiment", "{text} {", "write {{ and }}"),
        ("sentiment", {"prompt": "{text}", "answer": []}, "did you mean 'answers'"),
        ("sentiment", {"answers": []}, "has no 'prompt'"),
        ("sentiment", {"prompt": "{text}", "answers": ["a"]}, "1 answers.*2 labels"),
        ("sentiment", {"prompt": "{text}", "answers": ["a", "A "]}, "too alike"),
        ("sentiment", {"prompt": "{text}", "answers": {"frsh": "a"}}, "did you mean 'fresh'"),
        ("pleasantness", {"prompt": "{text}", "answers": ["a"]}, "answered by a number"),
        ("sentiment", "nowhere.txt", "'nowhere.txt' cannot be read"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_is_refused_in_a_sentence(task, template, message):
    with pytest.raises((TaskError, UnknownNameError), match=f"(?s){message}"):
        prompt_of(get_task(task), template)


@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=80), st.integers(20, 150))
def test_what_is_cut_is_the_longer_text_and_never_the_instruction(text, pair, room):
    prompt = prompt_of(SIMILARITY, "A {text} B {pair} C")
    asked = prompt.fitted(text, pair, lambda said: len(said) <= room)
    assert asked.startswith("A ") and asked.endswith(" C") and " B " in asked
    assert len(asked) <= room
    if len(prompt.ask(text, pair)) <= room:
        assert asked == prompt.ask(text, pair)


def test_an_instruction_without_room_for_a_text_is_said():
    with pytest.raises(TaskError, match="leaves no room for a text in 5 tokens"):
        prompt_of(SENTIMENT).fitted("x", None, lambda said: len(said) < 9, "5 tokens")


def test_an_answer_without_a_number_is_worth_nothing():
    assert number_or_mean([1.0, None, 3.0]) == [1.0, 2.0, 3.0]
    assert number_or_mean([None, None]) == [0.0, 0.0]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{text}} {text}: {{{text}}} {answers}",
        {"prompt": "{text} a }}", "answers": ["a", "b"]},
    ],
)
def test_a_record_of_a_prompt_gives_it_back(template):
    prompt = prompt_of(SENTIMENT, template)
    again = Prompt.of(prompt.record())
    assert again == prompt and again.fingerprint == prompt.fingerprint
    assert again.ask("x {y}") == prompt.ask("x {y}")
    assert prompt_of(SENTIMENT, prompt.record()) == prompt


def test_a_template_may_say_that_it_is_a_chat():
    assert prompt_of(SENTIMENT, {"prompt": "{text}", "chat": True}).chat
    assert not prompt_of(SENTIMENT, {"prompt": "{text}", "chat": False}).chat
    with pytest.raises(TaskError, match="true or false"):
        prompt_of(SENTIMENT, {"prompt": "{text}", "chat": "maybe"})
    with pytest.raises(TaskError, match="holds no 'prompt'"):
        Prompt.of({"answers": []})
