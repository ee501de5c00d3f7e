"""Statistics over several processes: who runs which batch, and one reduction at the end."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist

from orthomerge.moments import Moment, SecondMoment


def process_rank() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside a distributed job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_to_first(moments: dict[str, Moment], samples: int) -> tuple[dict[str, Moment], int]:
    """Process 0 gets the moments over all processes; the others keep their own part.

    Full moments are summed by one collective each, the short representations are gathered and
    added in the order of the processes, so the result does not depend on which came first.
    """
    rank, world = process_rank()
    if world == 1:
        return moments, samples
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor([samples], dtype=torch.int64, device=device)
    dist.reduce(total, dst=0)
    reduced: dict[str, Moment] = {}
    for lead, moment in moments.items():
        if isinstance(moment, SecondMoment):
            sums, count = moment.sums(device)
            dist.reduce(sums, dst=0)
            dist.reduce(count, dst=0)
            reduced[lead] = SecondMoment.from_sums(sums, int(count)) if rank == 0 else moment
            continue
        mine = moment.to("cpu") if moment.count else None
        parts: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(mine, parts, dst=0)
        found = [p for p in parts or [] if p is not None]
        reduced[lead] = reduce(operator.add, found) if found else moment
    return reduced, int(total) if rank == 0 else samples
