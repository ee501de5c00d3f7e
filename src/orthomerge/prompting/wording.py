"""Rows as a language model reads them: prompts and answers in the tokens of one model.

A decoder reads the prompt and goes on with a space and the answer; an encoder-decoder reads the
prompt and its decoder writes the answer. Positions are the same with and without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthomerge.errors import TaskError
from orthomerge.models.loading import say_cut
from orthomerge.prompting.batches import IGNORED, LikelihoodBatch, padded
from orthomerge.tasks import Prompt, Row

Text = tuple[str, str | None]


class Asked(NamedTuple):
    """A row's prompt, and answers to it, as token ids without an end.

    `cut` says that the row's texts were too long.
    """

    prompt: list[int]
    answers: list[list[int]]
    cut: bool = False


@dataclass(frozen=True)
class Wording:
    """A prompt in the tokens of one model.

    `max_length` bounds the tokens of a prompt: longer texts are cut, the instruction never is.
    `start` is what an encoder-decoder's answers start from, None for a decoder.
    """

    prompt: Prompt
    tokenizer: Any
    start: int | None = None
    max_length: int = 128

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: Any, config: Any, max_length: int = 128) -> Wording:
        """The wording for the model with this configuration.

        Raises:
            TaskError: a chat, and a model that has no chat template.
        """
        seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        if prompt.chat and (seq2seq or not getattr(tokenizer, "chat_template", None)):
            raise TaskError(
                "the model's tokenizer has no chat template: leave out --chat (chat: true), or "
                "take a model that was tuned for chats."
            )
        return cls(
            prompt, tokenizer, config.decoder_start_token_id if seq2seq else None, max_length
        )

    @property
    def seq2seq(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return self.start is not None

    def ask(self, text: str, pair: str | None = None) -> str:
        """The prompt of a row, its texts cut where it is too long.

        Raises:
            TaskError: the instruction alone is longer than `max_length` tokens.
        """

        def fits(asked: str) -> bool:
            return len(self._context(asked)) <= self.max_length

        return self.prompt.fitted(text, pair, fits, f"{self.max_length} tokens")

    def encode(self, text: Text, answers: Sequence[str]) -> Asked:
        """A row's prompt and each of the answers to it."""
        asked = self.ask(*text)
        context = self._context(asked)
        found = [self._answer(asked, context, said) for said in answers]
        return Asked(context, found, asked != self.prompt.ask(*text))

    def encode_all(self, texts: Sequence[Text], answers: Sequence[Sequence[str]]) -> list[Asked]:
        """Rows' prompts, each with answers of its own; what had to be cut is said."""
        found = [self.encode(text, words) for text, words in zip(texts, answers, strict=True)]
        say_cut(sum(item.cut for item in found), len(found), "prompts", self.max_length)
        return found

    def _chat(self, asked: str, answer: str | None = None) -> list[int]:
        """A user's message in the model's template, and the assistant's answer if there is one."""
        said = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        # Spaces at the end belong to the word that follows, lines do not.
        said = said.rstrip(" ") if answer is None else said + answer
        return list(self.tokenizer(said, add_special_tokens=False)["input_ids"])

    def _context(self, asked: str) -> list[int]:
        if self.seq2seq:
            return list(self.tokenizer(asked)["input_ids"])
        if self.prompt.chat:
            return self._chat(asked)
        return self._unended(asked.rstrip())

    def _answer(self, asked: str, context: list[int], answer: str) -> list[int]:
        if self.seq2seq:
            found = self._without_end(list(self.tokenizer(text_target=answer)["input_ids"]))
        elif self.prompt.chat:
            found = self._chat(asked, answer)[len(context) :]
        else:
            # Spaces at the end of a prompt belong to the word that follows.
            gap = asked[len(asked.rstrip()) :] or " "
            found = self._unended(asked.rstrip() + gap + answer)[len(context) :]
        if not found:
            raise TaskError(f"the answer '{answer}' has no token of its own: reword it.")
        return found

    def _unended(self, text: str) -> list[int]:
        return self._without_end(list(self.tokenizer(text)["input_ids"]))

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    @property
    def longest(self) -> int:
        """The tokens of the longest answer."""
        said = self.prompt.answers or ("-10.5",)
        return max(len(a) for a in self.encode(("", ""), said).answers)

    # What training and statistics read ----------------------------------------------------------

    def examples(self, rows: Sequence[Row]) -> list[dict[str, list[int]]]:
        """Rows to train on: loss is taken of the answer and the end after it, of nothing else."""
        found: list[dict[str, list[int]]] = []
        texts = [(row.text, row.pair) for row in rows]
        words = [[self.prompt.answer(row.label)] for row in rows]
        for context, (answer,), _ in self.encode_all(texts, words):
            ended = [*answer, self.tokenizer.eos_token_id]
            if self.seq2seq:
                found.append({"input_ids": context, "labels": ended})
            else:
                labels = [IGNORED] * len(context) + ended
                found.append({"input_ids": context + ended, "labels": labels})
        return found

    def collate(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Examples as one batch, padded on the right."""
        batch = self._inputs([e["input_ids"] for e in examples])
        return {**batch, "labels": padded([e["labels"] for e in examples], IGNORED)}

    def batches(
        self, texts: Sequence[Text], *, batch_size: int = 32, answers: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """Unlabelled batches for statistics: what the layers see while the task is answered.

        Each prompt is followed by one of the task's answers, taken in turn: a row's label is not
        looked at. With `answers=False`, and for numbers, the prompt stands alone.
        """
        words = self.prompt.answers if answers else ()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1] or ""))
        given = [[words[turn % len(words)]] if words else [] for turn in range(len(order))]
        found = self.encode_all([texts[row] for row in order], given)
        for at in range(0, len(found), batch_size):
            chunk = found[at : at + batch_size]
            tails = [asked.answers[0] if words else [] for asked in chunk]
            if self.start is None:
                yield self._inputs([a.prompt + t for a, t in zip(chunk, tails, strict=True)])
                continue
            decoder = self._inputs([[self.start, *tail] for tail in tails])
            yield {
                **self._inputs([asked.prompt for asked in chunk]),
                **{f"decoder_{name}": value for name, value in decoder.items()},
            }

    # What scoring reads -------------------------------------------------------------------------

    def likelihood_batch(self, asked: Sequence[Asked], *, share: bool = True) -> LikelihoodBatch:
        """The passes that weigh every answer of every row, as many answers a row.

        An answer whose tokens begin another one's, up to its last, needs no pass of its own: a
        decoder's output at a position depends on nothing behind it. So answers of one token cost
        one pass per row. With `share=False` every answer has its own, in order.
        """
        answers = len(asked[0].answers)
        passes: list[tuple[int, list[int]]] = []
        which: list[int] = []
        for row, item in enumerate(asked):
            tails = [answer[:-1] for answer in item.answers]
            own = _maximal(tails) if share else tails
            where = [next(i for i, t in enumerate(own) if t[: len(tail)] == tail) for tail in tails]
            which += [len(passes) + (w if share else i) for i, w in enumerate(where)]
            passes += [(row, tail) for tail in own]
        pairs = [(item, answer) for item in asked for answer in item.answers]
        if self.start is None:
            inputs = self._inputs([asked[row].prompt + tail for row, tail in passes])
            first = [len(item.prompt) - 1 for item, _ in pairs]
            owner = None
        else:
            decoder = self._inputs([[self.start, *tail] for _, tail in passes])
            inputs = {
                **self._inputs([item.prompt for item in asked]),
                **{f"decoder_{name}": value for name, value in decoder.items()},
            }
            first = [0] * len(pairs)
            owner = torch.tensor([row for row, _ in passes])
        targets = padded([answer for _, answer in pairs], IGNORED)
        at = torch.tensor(first)[:, None] + torch.arange(targets.shape[1])
        return LikelihoodBatch(inputs, torch.tensor(which), at, targets, answers, owner)

    def prompt_batch(self, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
        """Prompts to generate from: a decoder goes on at the right, so padding is on the left."""
        return self._inputs(prompts, left=not self.seq2seq)

    def _inputs(self, rows: Sequence[list[int]], *, left: bool = False) -> dict[str, Tensor]:
        return {
            "input_ids": padded(rows, self.tokenizer.pad_token_id, left=left),
            "attention_mask": padded([[1] * len(row) for row in rows], 0, left=left),
        }


def _maximal(tails: Sequence[list[int]]) -> list[list[int]]:
    """The tails that begin no other, each once."""
    found: list[list[int]] = []
    for tail in sorted(tails, key=len, reverse=True):
        if not any(other[: len(tail)] == tail for other in found):
            found.append(tail)
    return found
