"""What a model makes of prompts: how likely answers are to it, and what it answers itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from orthomerge.prompting.batches import IGNORED, LikelihoodBatch
from orthomerge.prompting.wording import Wording


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
    model: Any,
    wording: Wording,
    prompts: Sequence[list[int]],
    *,
    seed: int | None = None,
    longest: int | None = None,
) -> list[list[int]]:
    """What the model answers to prompts, as tokens without an end: greedy, or drawn under `seed`.

    At most `longest` tokens, by default one more than the longest answer has.
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
            max_new_tokens=longest or wording.longest + 1,
            eos_token_id=end,
            pad_token_id=wording.tokenizer.pad_token_id,
        )
    begun = 1 if wording.seq2seq else batch["input_ids"].shape[1]
    answers = [row[begun:] for row in found.tolist()]
    return [row[: row.index(end)] if end in row else row for row in answers]
