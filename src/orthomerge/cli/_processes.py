"""A verb run by several processes, as `accelerate launch` or `torchrun` start them."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from orthomerge.cli._app import err


class Process(NamedTuple):
    """This process's number, how many there are, and the device that is its own (None: any)."""

    rank: int
    world: int
    device: Any


@contextmanager
def several_processes() -> Generator[Process, None, None]:
    """This process and how many there are; a failure in one of them ends the block in all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _say_if_alone()
        yield Process(0, 1, None)
        return
    import torch

    # Its functions take the world's group of the moment of import for a default and never let go of
    # it; loading a model imports it. A group that outlives the block has threads that may abort the
    # process at its end, so the module is there before the group is.
    import torch.distributed.nn.functional  # pyright: ignore[reportUnusedImport]
    from accelerate import PartialState

    from orthomerge.statistics import end_processes, failing_together

    # On request, or without a GPU: PartialState by itself would see one process only.
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available())
    try:
        with failing_together():
            yield Process(state.process_index, state.num_processes, state.device)
    finally:
        end_processes()


def _say_if_alone() -> None:
    """Without a GPU `accelerate launch --num_processes 2` starts one process and does not say so.

    All it leaves of the wish is the address at which the processes would have met.
    """
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= set(os.environ) and "WORLD_SIZE" not in os.environ:
        err.print(
            "note: accelerate started one process only; without GPUs start several with "
            "'accelerate launch --multi_gpu --num_processes 2' or 'torchrun --nproc_per_node 2'.",
            highlight=False,
            soft_wrap=True,
        )
