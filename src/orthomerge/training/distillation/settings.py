"""How a distillation runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orthomerge.errors import MergeError

FORMS = ("classifier", "text", "embedding")
"""What tasks are: heads on a shared backbone, a language model's words, or a text's vector."""
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
"""What a head's outputs are, in the words of Transformers' `problem_type`."""
POOLINGS = ("mean", "cls", "last")
"""How an embedding model makes one vector of a text's tokens."""


@dataclass(frozen=True)
class DistillSettings:
    """How merged factors are trained towards each adapter's own answers.

    AdamW with a linear schedule and clipped gradients. Every step sees `batch_size` texts of every
    task, cut into passes of about `rows_a_pass` texts of like length; the result does not depend
    on the cut. `hidden` weighs the hidden states' error beside the answers'. `held_out` is the
    share of each task's texts that is not trained on but measures the agreement, every
    `evaluate_every` steps; None measures four times in all. With `patience` the training ends
    after so many measurements without gain. The factors of the best measurement are kept; with no
    steps they are the merge that it begins from.
    `max_length` bounds a text's tokens: 48 with heads and 128 otherwise where it is None.

    Raises:
        MergeError: a value out of its range.
    """

    steps: int = 150
    learning_rate: float = 2e-3
    batch_size: int = 4
    hidden: float = 0.3
    warmup: float = 0.06
    max_length: int | None = None
    held_out: float = 0.1
    evaluate_every: int | None = None
    patience: int | None = None
    rows_a_pass: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise MergeError(f"steps {self.steps}: it must be at least 0.")
        for name in ("batch_size", "rows_a_pass", "max_length", "evaluate_every",
                     "patience"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MergeError(f"{name} {value}: it must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise MergeError(f"learning rate {self.learning_rate:g}: it must be above 0.")
        if not 0 <= self.hidden < math.inf:
            raise MergeError(f"weight of the hidden states {self.hidden:g}: it is below 0.")
        for name in ("warmup", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise MergeError(f"{name} {getattr(self, name):g}: it must be from 0 to below 1.")

    @property
    def every(self) -> int:
        """Steps between two measurements of the agreement."""
        return self.evaluate_every or max(1, math.ceil(self.steps / 4))
