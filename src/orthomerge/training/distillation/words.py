"""Language models: the distribution of the next token, on answers or on whole texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orthomerge.errors import MergeError
from orthomerge.models.assets import ResolvedModel
from orthomerge.models.loading import load_language_model
from orthomerge.prompting import Wording, generate
from orthomerge.prompting.batches import padded
from orthomerge.tasks import Prompt
from orthomerge.training.distillation.backbone import Backbone
from orthomerge.training.distillation.chunks import token_distances
from orthomerge.training.distillation.forms import (
    Compared,
    Example,
    Form,
    Given,
    Taught,
    refuse_modules,
    text_means,
)
from orthomerge.training.distillation.teachers import Teacher

MAX_LENGTH = 128
ANSWER_TOKENS = 32
_BARE = Prompt((("", "text"),), ())


class Words(Form):
    """A decoder or encoder-decoder that answers every task in words.

    A task with a prompt is asked as in training, and each teacher writes its own answer: the
    distributions are compared at the answer's tokens and its end. A text without a prompt is
    compared at all its tokens, or, with `answer_tokens`, at so many that the teacher writes after
    it; an encoder-decoder always writes.

    Raises:
        AdapterError: an adapter with modules of its own.
        MergeError: pairs of texts without a prompt.
        AssetError: the base cannot be loaded, or writes no text.
    """

    def __init__(
        self,
        base: ResolvedModel,
        tokenizer: Any,
        teachers: Sequence[Teacher],
        max_length: int | None,
        answer_tokens: int | None,
    ) -> None:
        for teacher in teachers:
            _check(teacher)
        self.model = load_language_model(base.path_or_id, name=base.name).requires_grad_(False)
        self.backbone = Backbone(self.model, language=True)
        self._wordings = [
            Wording.of(
                t.prompt or _BARE, tokenizer, self.model.config,
                max_length or t.max_length or MAX_LENGTH,
            )
            for t in teachers
        ]  # fmt: skip
        self._asked = [t.prompt is not None for t in teachers]
        if answer_tokens is None and self._wordings[0].seq2seq:
            answer_tokens = ANSWER_TOKENS
        self._writes = answer_tokens
        vocabulary: Any = self.model.get_output_embeddings().weight
        self._vocabulary = len(vocabulary)

    def identity(self, task: int) -> dict[str, Any]:
        """What a teacher's answers depend on besides the adapter, the base and the texts."""
        wording = self._wordings[task]
        prompt = wording.prompt.fingerprint if self._asked[task] else None
        return {"form": "text", "max_length": wording.max_length, "prompt": prompt,
                "writes": self._writes}  # fmt: skip

    def read(self, task: int, texts: Sequence[tuple[str, str | None]]) -> list[Example]:
        """Prompts, or bare texts, as token ids; `asked` is the first token that is compared."""
        wording = self._wordings[task]
        if self._asked[task]:
            found = [wording.encode(text, []).prompt for text in texts]
            longest: int | None = wording.longest + 1
        else:
            cut = {"truncation": True, "max_length": wording.max_length}
            found = [list(wording.tokenizer(text, **cut)["input_ids"]) for text, _ in texts]
            longest = self._writes
        return [{"input_ids": ids, "writes": longest, "task": task} for ids in found]

    def written(self, examples: Sequence[Example]) -> list[Example]:
        """The prompts with the model's own answers, greedy; bare texts as they are."""
        wording = self._wordings[int(examples[0]["task"])]
        longest = examples[0]["writes"]
        prompts = [list(e["input_ids"]) for e in examples]
        if longest is None:
            return [{"input_ids": ids, "asked": 0} for ids in prompts]
        answers = generate(self.model, wording, prompts, longest=longest)
        if wording.start is not None:
            return [
                {"input_ids": ids, "decoder_input_ids": [wording.start, *said], "asked": 0}
                for ids, said in zip(prompts, answers, strict=True)
            ]
        return [
            {"input_ids": ids + said, "asked": len(ids) - 1}
            for ids, said in zip(prompts, answers, strict=True)
        ]

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Texts as one batch, padded on the right."""
        found = self._padded([e["input_ids"] for e in examples], "")
        if "decoder_input_ids" in examples[0]:
            found |= self._padded([e["decoder_input_ids"] for e in examples], "decoder_")
        return found

    def _padded(self, rows: Sequence[list[int]], prefix: str) -> dict[str, Tensor]:
        pad = self._wordings[0].tokenizer.pad_token_id
        return {
            f"{prefix}input_ids": padded(rows, pad),
            f"{prefix}attention_mask": padded([[1] * len(row) for row in rows], 0),
        }

    def counted(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The tokens that are no padding; of an encoder-decoder the decoder's."""
        return inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()

    def answers(self, task: int, states: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Nothing: the hidden states say all."""
        return [torch.zeros(0)] * len(inputs["input_ids"])

    def compare(self, task: int, given: Given, taught: Taught) -> Compared:
        """`KL(teacher ‖ student)` of the next token, the mean over a text's compared tokens."""
        hidden = given.states.last_hidden_state
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for row, text in zip(given.rows, given.texts, strict=True):
            asked, count = taught.examples[text]["asked"], taught.counts[text]
            ours.append(hidden[int(row), asked:count])
            theirs.append(taught.hidden[taught.tokens(text)][asked:])
        target = torch.cat(theirs).to(hidden)
        found = token_distances(
            torch.cat(ours), target, self.backbone.logits, self.backbone.logits,
            vocabulary=self._vocabulary,
        )  # fmt: skip
        counts = torch.tensor([len(o) for o in ours], device=hidden.device)
        said = text_means(found.same.to(found.divergence), counts)
        return Compared(text_means(found.divergence, counts), said)

    def agreement(self, task: int, said: Tensor, taught: Taught, texts: Sequence[int]) -> float:
        """The share of compared tokens at which both would write the same, the mean over texts."""
        return float(said.mean())


def _check(teacher: Teacher) -> None:
    refuse_modules(teacher)
    if teacher.prompt is None and any(pair for _, pair in teacher.texts):
        raise MergeError(
            f"the texts of '{teacher.name}' are pairs, and nothing says how a language model reads "
            "them: give a prompt, or one text a row."
        )
