"""Language models scored on tasks in words: by the likelihood of answers, or by answering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from orthomerge.errors import unknown_name
from orthomerge.evaluation.classification import Update, applied, score
from orthomerge.models.loading import preferred_device
from orthomerge.prompting import Wording, generate, log_likelihoods
from orthomerge.tasks import Kind, Prompt, Row, number_or_mean

Progress = Callable[[int, int], None]
"""Called with the rows done, and of how many."""
SCORINGS = ("likelihood", "generation")


class Likelihoods(NamedTuple):
    """`log p(answer | prompt)` of every answer to every row, and the answers' tokens."""

    sums: np.ndarray  # [rows, answers]
    lengths: np.ndarray  # [rows, answers]

    @property
    def normalised(self) -> np.ndarray:
        """The mean log-probability of a token: `[rows, answers]`."""
        return self.sums / self.lengths


class TextEvaluator:
    """Scores any update of one language model, decoder or encoder-decoder, on tasks in words."""

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int = 128, batch_size: int = 32
    ) -> None:
        self._model = model.eval().to(preferred_device())
        self._tokenizer = tokenizer
        self._max_length, self._batch_size = max_length, batch_size

    def wording(self, prompt: Prompt) -> Wording:
        """A prompt in this model's tokens."""
        return Wording.of(prompt, self._tokenizer, self._model.config, self._max_length)

    def likelihoods(
        self,
        rows: Sequence[Row],
        prompt: Prompt,
        update: Update | None = None,
        progress: Progress | None = None,
    ) -> Likelihoods:
        """How likely each of the prompt's answers is to each row, in the order of `rows`.

        Raises:
            AdapterError: the update does not fit the model.
            TaskError: the prompt is too long, or its answers are numbers.
        """
        wording, shape = self.wording(prompt), (len(rows), len(prompt.answers))
        texts = [(row.text, row.pair) for row in rows]
        asked = wording.encode_all(texts, [prompt.answers] * len(rows))
        sums, lengths = np.zeros(shape), np.zeros(shape, dtype=int)
        with applied(self._model, update or {}), torch.inference_mode():
            for chunk in self._chunks([len(item.prompt) for item in asked], progress):
                batch = wording.likelihood_batch([asked[i] for i in chunk])
                sums[chunk] = log_likelihoods(self._model, batch).cpu().double().numpy()
                lengths[chunk] = batch.lengths.numpy()
        return Likelihoods(sums, lengths)

    def answers(
        self,
        rows: Sequence[Row],
        prompt: Prompt,
        update: Update | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """What the model answers to each row, greedily, no longer than the longest answer.

        Raises:
            AdapterError: the update does not fit the model.
            TaskError: the prompt is too long.
        """
        wording = self.wording(prompt)
        texts = [(row.text, row.pair) for row in rows]
        asked = [item.prompt for item in wording.encode_all(texts, [()] * len(rows))]
        found = [""] * len(rows)
        with applied(self._model, update or {}):
            for chunk in self._chunks([len(item) for item in asked], progress):
                tokens = generate(self._model, wording, [asked[i] for i in chunk])
                said = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
                for i, answer in zip(chunk, said, strict=True):
                    found[i] = answer
        return found

    def _chunks(self, lengths: Sequence[int], progress: Progress | None) -> Iterator[list[int]]:
        """Places of rows that run together, those of like length; the asker is done with each."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for at in range(0, len(order), self._batch_size):
            chunk = order[at : at + self._batch_size]
            yield chunk
            if progress is not None:
                progress(at + len(chunk), len(order))

    def predict(
        self,
        rows: Sequence[Row],
        prompt: Prompt,
        update: Update | None = None,
        *,
        scoring: str = "likelihood",
        progress: Progress | None = None,
    ) -> Predictions:
        """What the model takes the rows for, in their order.

        `scoring` "likelihood" takes the answer with the highest log-probability, summed over its
        tokens, "generation" what the model writes; a number is always written, since there is no
        list of numbers to choose from. `progress` is given the rows done, and of how many.

        Raises:
            UnknownNameError: no such scoring.
            AdapterError: the update does not fit the model.
            TaskError: the prompt is too long.
        """
        if scoring not in SCORINGS:
            raise unknown_name("scoring", scoring, SCORINGS)
        if scoring == "likelihood" and not prompt.regression:
            found = self.likelihoods(rows, prompt, update, progress)
            whole = np.ones(len(rows), dtype=bool)
            return Predictions(
                found.sums.argmax(axis=1), found.normalised.argmax(axis=1), whole, "likelihood"
            )
        read = [prompt.read(said) for said in self.answers(rows, prompt, update, progress)]
        known = np.array([value is not None for value in read])
        values = (
            np.array(number_or_mean(read))
            if prompt.regression
            else np.array([-1 if value is None else int(value) for value in read])
        )
        return Predictions(values, values, known, "generation")


class Predictions(NamedTuple):
    """What a model takes rows for.

    `values` are class indices (-1: the answer is no class) or numbers (the mean of the others where
    there is none); `normalised` the classes by log-probability a token; `answered` which rows got
    an answer that can be read; `scoring` how it was found.
    """

    values: np.ndarray
    normalised: np.ndarray
    answered: np.ndarray
    scoring: str

    def metrics(
        self, kind: Kind, labels: Sequence[int | float], num_labels: int
    ) -> dict[str, float]:
        """All metrics of the task's kind, and what is particular to the scoring.

        `accuracy_normalised` is the accuracy by log-probability a token; `answered` the share of
        written answers that can be read.
        """
        found = score(kind, self.values, labels, num_labels)
        if self.scoring == "generation":
            return {**found, "answered": float(self.answered.mean())}
        other = score(kind, self.normalised, labels, num_labels)
        return {**found, "accuracy_normalised": other["accuracy"]}
