"""The instruction of every task that comes along, and its answers where they are no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Template(NamedTuple):
    """An instruction with placeholders; `answers` in the order of the labels, or by label.

    With `chat` it is said in the chat template of the model's tokenizer.
    """

    prompt: str
    answers: Sequence[Any] | Mapping[Any, Any] | None = None
    chat: bool = False


_SENTENCES = "\nFirst: {text}\nSecond: {pair}\nAnswer:"

TEMPLATES: dict[str, Template] = {
    "acceptability": Template(
        "Are the words of this sentence in order? Answer {answers}.\nSentence: {text}\nAnswer:",
        ("no", "yes"),
    ),
    "excerpt": Template(
        "Are the words taken from the sentence? Answer {answers}.\n"
        "Sentence: {text}\nWords: {pair}\nAnswer:",
        ("no", "yes"),
    ),
    "pleasantness": Template(
        "How pleasant is this word, from -1.0 (unpleasant) to 1.0 (pleasant)?\n"
        "Word: {text}\nAnswer:"
    ),
    "role": Template("Who says this in a debate? Answer {answers}.\nSentence: {text}\nAnswer:"),
    "sentiment": Template(
        "Is this film review fresh or rotten? Answer {answers}.\nReview: {text}\nAnswer:"
    ),
    "similarity": Template(
        "How much of the first headline does the second keep, from -1.0 (nothing) to 1.0 "
        "(everything)?" + _SENTENCES
    ),
    "subjectivity": Template(
        "Is this sentence from a film's plot or from a review? Answer {answers}.\n"
        "Sentence: {text}\nAnswer:"
    ),
    "topic": Template(
        "To which topic do these words belong? Answer {answers}.\nWords: {text}\nAnswer:"
    ),
    "glue/cola": Template(
        "Is this sentence acceptable English? Answer {answers}.\nSentence: {text}\nAnswer:",
        ("no", "yes"),
    ),
    "glue/sst2": Template(
        "Is the sentiment of this sentence negative or positive? Answer {answers}.\n"
        "Sentence: {text}\nAnswer:"
    ),
    "glue/mrpc": Template(
        "Do these sentences mean the same? Answer {answers}." + _SENTENCES, ("no", "yes")
    ),
    "glue/qqp": Template(
        "Do these questions ask the same? Answer {answers}." + _SENTENCES, ("no", "yes")
    ),
    "glue/mnli": Template(
        "Does the premise entail the hypothesis? Answer {answers}.\n"
        "Premise: {text}\nHypothesis: {pair}\nAnswer:",
        ("yes", "maybe", "no"),
    ),
    "glue/qnli": Template(
        "Does the sentence answer the question? Answer {answers}.\n"
        "Question: {text}\nSentence: {pair}\nAnswer:",
        ("yes", "no"),
    ),
    "glue/rte": Template(
        "Does the premise entail the hypothesis? Answer {answers}.\n"
        "Premise: {text}\nHypothesis: {pair}\nAnswer:",
        ("yes", "no"),
    ),
    "glue/stsb": Template(
        "How alike are these sentences in meaning, from 0.0 (not at all) to 5.0 (the same)?"
        + _SENTENCES
    ),
}
