"""What distillation asks of a kind of task: heads, words or vectors behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orthomerge.errors import AdapterError
from orthomerge.models.loading import encode
from orthomerge.training.distillation.backbone import Backbone
from orthomerge.training.distillation.teachers import Teacher
from orthomerge.training.distillation.updates import Adder

Example = dict[str, Any]
"""A text as token ids, under the names of the model's inputs, and what else belongs to it."""


@dataclass(frozen=True)
class Taught:
    """What one teacher said of its texts.

    `examples` are the texts, with what the teacher wrote where it writes. `hidden` holds the last
    hidden states of the tokens that count, text after text, `counts` how many each text has.
    `answers` has what the head said, a row per text (per token for a tagger, which `counts` cuts);
    it is empty where the hidden states say all.
    """

    examples: list[Example]
    hidden: Float[Tensor, "tokens d"]
    counts: list[int]
    answers: Tensor

    def tokens(self, row: int) -> slice:
        """Where a text's tokens are."""
        start = sum(self.counts[:row])
        return slice(start, start + self.counts[row])

    def length(self, row: int) -> int:
        """The tokens that the model reads and writes."""
        example = self.examples[row]
        return len(example["input_ids"]) + len(example.get("decoder_input_ids", ()))


class Given(NamedTuple):
    """The output of the backbone on a batch of `inputs`, whose `rows` are `texts` of one task."""

    states: Any
    inputs: Mapping[str, Tensor]
    rows: Tensor
    texts: Sequence[int]


class Compared(NamedTuple):
    """Per text: how far the student's answer is from the teacher's, and what it said."""

    errors: Float[Tensor, " rows"]
    said: Tensor


class Form(ABC):
    """One base with all its tasks, frozen, for one kind of task: texts in, hidden states out.

    What is not abstract is right for models that read whole texts and write none.
    """

    model: Any
    backbone: Backbone
    tokenizer: Any
    max_length: int

    def to(self, device: torch.device) -> None:
        """Move the base and the heads."""
        self.model.to(device)

    @abstractmethod
    def identity(self, task: int) -> dict[str, Any]:
        """What a teacher's answers depend on besides the adapter, the base and the texts."""

    def read(self, task: int, texts: Sequence[tuple[str, str | None]]) -> list[Example]:
        """Texts as token ids."""
        return encode(self.tokenizer, texts, self.max_length)

    def written(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with what the model, as it is now, writes after them."""
        return list(examples)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Examples as one batch of model inputs, padded on the right."""
        return dict(self.tokenizer.pad(list(examples), padding_side="right", return_tensors="pt"))

    def counted(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which tokens' hidden states count, `[rows, length]`: those that are no padding."""
        return inputs["attention_mask"].bool()

    @abstractmethod
    def answers(self, task: int, states: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What a teacher's head says of every row of a batch, to be kept."""

    @abstractmethod
    def compare(self, task: int, given: Given, taught: Taught) -> Compared:
        """The student's answers against the teacher's."""

    @abstractmethod
    def agreement(self, task: int, said: Tensor, taught: Taught, texts: Sequence[int]) -> float:
        """How well the answers of all these texts agree: 1 is the same."""


def refuse_modules(teacher: Teacher) -> None:
    """Refuse an adapter with modules of its own where the tasks have no heads.

    Raises:
        AdapterError: it has some.
    """
    if teacher.head:
        raise AdapterError(
            f"'{teacher.adapter.called}' trained '{next(iter(teacher.head))}' itself "
            "(modules_to_save), which all tasks share: it cannot be held for each task."
        )


def text_means(
    values: Float[Tensor, " tokens"], counts: Int[Tensor, " texts"]
) -> Float[Tensor, " texts"]:
    """The mean of each text's tokens, which follow one another, `counts` of them a text."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
    return values.new_zeros(len(counts)).index_add(0, owner, values) / counts


class Installed(NamedTuple):
    """A form on its device, with the hooks that add updates."""

    form: Form
    adder: Adder
    device: torch.device
