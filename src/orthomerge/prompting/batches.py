"""Tokens as tensors: rows of one length, and passes that weigh several answers of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

IGNORED = -100
"""The label of a token that no loss is taken of, as PyTorch's cross-entropy has it."""


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
