"""Statistics over several processes: who runs which batch, and one reduction at the end."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist

from orthomerge.errors import OrthomergeError, StatisticsError
from orthomerge.moments import Moment, RowMoment, SecondMoment


def process_rank() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside a distributed job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def failing_together() -> Generator[None, None, None]:
    """A block that fails in every process where it fails in one, so that no other waits for it.

    A process that failed raises what it met, the others the same mistake of the user, or for any
    other failure a `RuntimeError` that names the process.
    """
    rank, world = process_rank()
    if world == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as problem:
        mine = problem
    said = None
    if isinstance(mine, OrthomergeError):
        said = type(mine), str(mine)
    elif mine is not None:
        said = RuntimeError, f"process {rank} failed: {type(mine).__name__}: {mine}"
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, said)
    if mine is not None:
        raise mine
    for kind, message in filter(None, everyone):
        raise kind(message)


def end_processes() -> None:
    """End the world's group of processes, if there is one: what `destroy_process_group` is for.

    Torch 2.4 and 2.5 wait there for gloo's threads with the interpreter's lock held, and for ever
    where one of them has a tensor left to let go of, which takes the lock. A backend that Python
    holds gives the lock away before it waits, so the backends outlive the group and end last.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    group: Any = dist.group.WORLD
    backends = [group._get_backend(device) for device in group._device_types]
    del group
    dist.destroy_process_group()
    backends.clear()


def reduce_to_first(moments: dict[str, Moment], samples: int) -> tuple[dict[str, Moment], int]:
    """Process 0 gets the moments over all processes; the others keep their own part.

    Full moments are summed by one collective each, the short representations are gathered and
    added in the order of the processes, so the result does not depend on which came first.

    Raises:
        StatisticsError: no process saw a row (in all processes).
    """
    rank, world = process_rank()
    if world > 1:
        moments, samples = _reduced(moments, samples, rank, world)
    with failing_together():
        empty = [lead for lead, moment in moments.items() if rank == 0 and not moment.count]
        if empty:
            raise StatisticsError(
                f"layer '{empty[0]}': no feature row was seen: the sample is empty or all padding."
            )
    return moments, samples


def _reduced(
    moments: dict[str, Moment], samples: int, rank: int, world: int
) -> tuple[dict[str, Moment], int]:
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
        # A row sample travels as it is: its priorities say which rows one process would have kept.
        rows = isinstance(moment, RowMoment)
        mine = (moment.sample_on("cpu") if rows else moment.to("cpu")) if moment.count else None
        parts: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(mine, parts, dst=0)
        found = [p for p in parts or [] if p is not None]
        join: Callable[[Any, Any], Any] = RowMoment.pool if rows else operator.add
        reduced[lead] = reduce(join, found) if found else moment
    return reduced, int(total) if rank == 0 else samples
