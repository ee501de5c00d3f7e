"""The Trainer for answers in words: logits where an answer is predicted, and nowhere else."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer
from transformers.loss import loss_utils

from orthomerge.models.loading import quiet
from orthomerge.prompting import IGNORED


class AnswerTrainer(Trainer):
    """Use it where the loss is taken of few tokens of a row.

    A decoder's loss needs the logits of the positions before the answer's tokens alone; a prompt's
    would be computed, `positions · vocabulary` numbers in float32, and thrown away. The loss is the
    Trainer's own: the sum of the answers' cross-entropies over the number of their tokens.
    """

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model can be asked for some logits, and its loss is the ordinary one."""
        with quiet():
            ordinary = getattr(model, "loss_function", None) is loss_utils.ForCausalLMLoss
        return ordinary and "logits_to_keep" in inspect.signature(model.forward).parameters

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch whose `labels` are `IGNORED` everywhere but at the answers."""
        read = {name: value for name, value in inputs.items() if name != "labels"}
        # The logits at a position predict the token after it.
        targets = inputs["labels"][:, 1:]
        kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        outputs = model(**read, logits_to_keep=kept, use_cache=False)
        logits = outputs.logits.float().flatten(0, 1)
        total = functional.cross_entropy(
            logits, targets[:, kept].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum()
        loss = total / torch.as_tensor(num_items_in_batch, device=total.device)
        if self.args.average_tokens_across_devices and self.model_accepts_loss_kwargs:
            loss = loss * cast(int, self.accelerator.num_processes)  # DDP takes the mean of them
        return (loss, outputs) if return_outputs else loss
