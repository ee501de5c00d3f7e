"""A verb run by several processes, as `accelerate launch` or `torchrun` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Job(NamedTuple):
    """This process's number, how many there are, and the device that is its own (None: any)."""

    rank: int
    world: int
    device: Any


@contextmanager
def several_processes() -> Iterator[Job]:
    """The job this process is part of; what fails in one process ends the block in all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Job(0, 1, None)
        return
    from accelerate import PartialState

    from orthomerge.features import failing_together

    state = PartialState()
    try:
        with failing_together():
            yield Job(state.process_index, state.num_processes, state.device)
    finally:
        state.destroy_process_group()
