"""Rows as a language model reads them: prompts and answers as tokens, and answers weighed by it.

A decoder reads the prompt and goes on with a space and the answer; an encoder-decoder reads the
prompt and its decoder writes the answer. Positions are the same with and without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orthomerge.errors import TaskError
from orthomerge.tasks import Prompt, Row

IGNORED = -100
"""The label of a token that no loss is taken of, as PyTorch's cross-entropy has it."""

Text = tuple[str, str | None]


class Asked(NamedTuple):
    """A row's prompt, and answers to it, as token ids without an end."""

    prompt: list[int]
    answers: list[list[int]]


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
        """The wording for the model with this configuration."""
        seq2seq = bool(getattr(config, "is_encoder_decoder", False))
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
        return Asked(context, [self._answer(asked, context, said) for said in answers])

    def _context(self, asked: str) -> list[int]:
        if self.seq2seq:
            return list(self.tokenizer(asked)["input_ids"])
        return self._unended(asked.rstrip())

    def _answer(self, asked: str, context: list[int], answer: str) -> list[int]:
        if self.seq2seq:
            found = self._without_end(list(self.tokenizer(text_target=answer)["input_ids"]))
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
        for row in rows:
            context, (answer,) = self.encode((row.text, row.pair), [self.prompt.answer(row.label)])
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
        found = [
            self.encode(texts[row], [words[turn % len(words)]] if words else [])
            for turn, row in enumerate(order)
        ]
        for at in range(0, len(found), batch_size):
            piece = found[at : at + batch_size]
            tails = [asked.answers[0] if words else [] for asked in piece]
            if self.start is None:
                yield self._inputs([a.prompt + t for a, t in zip(piece, tails, strict=True)])
                continue
            decoder = self._inputs([[self.start, *tail] for tail in tails])
            yield {
                **self._inputs([asked.prompt for asked in piece]),
                **{f"decoder_{name}": value for name, value in decoder.items()},
            }

    # What scoring reads -------------------------------------------------------------------------

    def likelihood_batch(self, asked: Sequence[Asked], *, share: bool = True) -> LikelihoodBatch:
        """The passes that weigh every answer of every row, as many answers a row.

        An answer whose tokens begin another one's, up to its last, needs no pass of its own: a
        decoder's output at a position depends on nothing behind it. So answers of one token cost
        one pass a row. With `share=False` every answer has its own, in order.
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


def padded(
    rows: Sequence[Sequence[int]], value: int, *, left: bool = False
) -> Int[Tensor, "rows longest"]:
    """Rows of one length."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return torch.tensor([[*f, *row] if left else [*row, *f] for row, f in pairs])


class LikelihoodBatch(NamedTuple):
    """The passes of `likelihood_batch`, and where each answer's tokens are predicted in them.

    For a pair of row and answer (rows first): `which` is its pass, `at` the positions whose outputs
    predict its tokens `targets` (IGNORED where it has none any more). `owner` is the row that each
    pass of an encoder-decoder reads.
    """

    inputs: dict[str, Tensor]
    which: Int[Tensor, " pairs"]
    at: Int[Tensor, "pairs tokens"]
    targets: Int[Tensor, "pairs tokens"]
    answers: int
    owner: Int[Tensor, " passes"] | None

    @property
    def lengths(self) -> Int[Tensor, "rows answers"]:
        """The number of tokens of each answer."""
        return (self.targets != IGNORED).sum(dim=1).reshape(-1, self.answers)


def log_likelihoods(model: Any, batch: LikelihoodBatch) -> Float[Tensor, "rows answers"]:
    """`log p(answer | prompt) = Σ_k log p(token_k | prompt, token_<k)` for every row and answer.

    Gradients flow where they are on. The logits are worked out at the positions that are asked for
    alone, where the model's forward allows it; the prompt of an encoder-decoder is encoded once.
    """
    device = next(model.parameters()).device
    which, at, targets = (t.to(device) for t in (batch.which, batch.at, batch.targets))
    real = targets != IGNORED
    at = at.where(real, at[:, :1])  # past its end an answer repeats its first position
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    if batch.owner is not None:
        logits = _decoded(model, inputs, batch.owner.to(device))
    elif "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept, at = cast(tuple[Tensor, Tensor], at.unique(return_inverse=True))
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    else:
        logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(dim=-1)
    taken = logits[which[:, None], at, targets.clamp(min=0)] - total[which[:, None], at]
    return taken.where(real, taken.new_zeros(())).sum(dim=1).reshape(-1, batch.answers)


def _decoded(model: Any, inputs: dict[str, Tensor], owner: Tensor) -> Tensor:
    """The decoder's logits in every pass, over the encoded prompt of the row that owns it."""
    mask = inputs["attention_mask"]
    encoded = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask)
    return model(
        encoder_outputs=(encoded.last_hidden_state[owner],),
        attention_mask=mask[owner],
        decoder_input_ids=inputs["decoder_input_ids"],
        decoder_attention_mask=inputs["decoder_attention_mask"],
        use_cache=False,
    ).logits


def generate(
    model: Any, wording: Wording, prompts: Sequence[list[int]], *, seed: int | None = None
) -> list[list[int]]:
    """What the model answers to prompts, as tokens without an end: greedy, or drawn under `seed`.

    At most one token longer than the longest answer.
    """
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in wording.prompt_batch(prompts).items()}
    end = wording.tokenizer.eos_token_id
    # None takes back what the model's own generation settings may say.
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if seed is not None:
        how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    with torch.random.fork_rng(), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        found = model.generate(
            **batch,
            **how,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=wording.longest + 1,
            eos_token_id=end,
            pad_token_id=wording.tokenizer.pad_token_id,
        )
    begun = 1 if wording.seq2seq else batch["input_ids"].shape[1]
    answers = [row[begun:] for row in found.tolist()]
    return [row[: row.index(end)] if end in row else row for row in answers]
