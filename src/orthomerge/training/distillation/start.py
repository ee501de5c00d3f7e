"""Where the training begins: a merge, scaled and cut so that it is near the teachers already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from orthomerge.errors import MergeError
from orthomerge.factors import LoraFactors, from_dense, truncate
from orthomerge.merging import AUTO, SUM, Update
from orthomerge.merging.parts.options import check_rank
from orthomerge.training.distillation.batches import Place
from orthomerge.training.distillation.student import Classroom
from orthomerge.training.distillation.updates import Added, added

"""The rank that is chosen: the smallest whose start is about as near as the whole merge's."""
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""What a merge may be scaled by where no weights are given: the nearest to the teachers wins."""
_PROBED = 16
"""Texts of each task that choose scale and rank."""
_ABOUT = 1.05
"""How much farther from the teachers a smaller rank may begin."""


class Start(NamedTuple):
    """The factors to begin from, and what the merge was multiplied by."""

    layers: dict[str, LoraFactors]
    scale: float


def check_start_rank(rank: int | str | None) -> None:
    """Refuse what is no rank of a distilled merge.

    Raises:
        MergeError: neither a whole number above 0, "sum", "auto" nor None.
    """
    if rank in (None, SUM, AUTO):
        return
    if isinstance(rank, str):
        raise MergeError(f"the rank '{rank}' is none: give a whole number, '{SUM}' or '{AUTO}'.")
    check_rank("rank", rank)


def begin(
    room: Classroom,
    merge: Mapping[str, Update],
    train: Sequence[Sequence[int]],
    rank: int | str | None,
    *,
    dense_rank: int,
    scaled: bool,
) -> Start:
    """The merge as factors of the rank that was asked for.

    With `scaled` it is multiplied by that of a few numbers which brings it nearest to the teachers
    on some texts to train on (`train`, by task). Updates that are dense are cut to `dense_rank`.
    """
    whole = {
        name: (u if isinstance(u, LoraFactors) else from_dense(u, dense_rank)).to(torch.float32)
        for name, u in merge.items()
    }
    places = [Place(t, r) for t, rows in enumerate(train) for r in rows[:_PROBED]]
    scale = _nearest(room, whole, places) if scaled else 1.0
    whole = {n: LoraFactors(f.A, f.B, f.scaling * scale) for n, f in whole.items()}
    if rank in (None, SUM):
        return Start(whole, scale)
    if rank == AUTO:
        return Start(_smallest(room, whole, places), scale)
    return Start({n: truncate(f, int(rank or 0)) for n, f in whole.items()}, scale)


def _nearest(room: Classroom, whole: Mapping[str, LoraFactors], places: Sequence[Place]) -> float:
    """The number that brings the merge nearest to the teachers."""
    plain = added(whole, room.device)
    near = {s: room.mean_loss(places, _times(plain, s)) for s in SCALES}
    return min(near, key=near.__getitem__)


def _times(update: Mapping[str, Added], scale: float) -> dict[str, Added]:
    return {n: Added(u.A, u.B * scale) for n, u in update.items()}


def _smallest(
    room: Classroom, whole: Mapping[str, LoraFactors], places: Sequence[Place]
) -> dict[str, LoraFactors]:
    """The merge cut to the smallest of 4, 8, 16, ... that is about as near to the teachers."""
    most = max(f.rank for f in whole.values())
    bound = _ABOUT * room.mean_loss(places, added(whole, room.device))
    tried = 4
    while tried < most:
        cut = {n: truncate(f, tried) for n, f in whole.items()}
        if room.mean_loss(places, added(cut, room.device)) <= bound:
            return cut
        tried *= 2
    return dict(whole)


def sum_of_ranks(layers: Sequence[Mapping[str, LoraFactors]]) -> int:
    """The rank that the plain sum of adapters has."""
    with torch.no_grad():
        return sum(max((each[name].rank for name in each), default=0) for each in layers)
