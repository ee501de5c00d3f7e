"""The divergence of two models' next tokens from their hidden states, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

ENTRIES = 2**24
"""Logits of one model that are held at a time: 64 MiB in float32."""

Read = Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens vocabulary"]]
"""Logits of hidden states."""


class TokenDistances(NamedTuple):
    """Per token: `KL(teacher ‖ student)` in nats, and whether both would write the same token."""

    divergence: Float[Tensor, " tokens"]
    same: Bool[Tensor, " tokens"]


def token_distances(
    student: Float[Tensor, "tokens d"],
    teacher: Float[Tensor, "tokens d"],
    read_student: Read,
    read_teacher: Read,
    *,
    vocabulary: int,
    entries: int = ENTRIES,
) -> TokenDistances:
    """How far the student's next-token distributions are from the teacher's.

    A part of the tokens is taken at a time, as many as `entries` logits allow, and logits are
    worked out once more on the way back instead of being held. So memory is
    O(entries + tokens · d) whatever the vocabulary; the result is the same for every cut.
    """
    size = max(1, entries // vocabulary)
    parts: list[TokenDistances] = []
    for at in range(0, len(student), size):
        ours, theirs = student[at : at + size], teacher[at : at + size]
        if len(student) <= size or not torch.is_grad_enabled():
            parts.append(_compare(ours, theirs, read_student, read_teacher))
            continue
        again = cast(Any, checkpoint)
        parts.append(again(_compare, ours, theirs, read_student, read_teacher, use_reentrant=False))
    return TokenDistances(
        torch.cat([p.divergence for p in parts]), torch.cat([p.same for p in parts])
    )


def _compare(
    student: Tensor, teacher: Tensor, read_student: Read, read_teacher: Read
) -> TokenDistances:
    with torch.no_grad():
        target = _logs(read_teacher(teacher))
    said = _logs(read_student(student))
    same = said.argmax(dim=-1) == target.argmax(dim=-1)
    return TokenDistances((target.exp() * (target - said)).sum(dim=-1), same)


def _logs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
