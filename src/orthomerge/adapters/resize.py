"""An adapter made smaller: the best approximation of a lower rank, everything else kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orthomerge.adapters.files import Adapter
from orthomerge.adapters.merge import merge_adapters
from orthomerge.errors import MergeError
from orthomerge.merging import AUTO, MergeConfig, MergedUpdate


def resize_adapter(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    rank: int | str = AUTO,
    energy: float | None = None,
    base: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergedUpdate:
    """Use when an adapter has a higher rank than it needs, or than a server takes.

    Every layer becomes its best approximation in Frobenius norm, of rank `rank` or of the least
    rank that keeps `energy` of its squared norm; a layer of no higher rank stays as it is. The
    scaling goes into B (alpha = r). Heads and other `modules_to_save`, biases and added tokens are
    kept. It is the merge of one adapter at weight 1: `merge.json` says so, and the error of every
    layer is in it and in the `truncation_error` returned.

    Args:
        adapter: a PEFT folder, an id of the hub or an adapter read before.
        output: the folder to write; it appears whole or not at all.
        rank: a whole number, or "auto".
        energy: with "auto", the part of each layer's squared norm to keep; 0.99 by default.
        base: the base model, for DoRA.
        overwrite: replace an output folder that orthomerge wrote.
        progress: called with the number of layers done and their total.

    Raises:
        MergeError: a rank or an energy that is none.
        AdapterError: an adapter that cannot be read.
        OutputError: an output that is not free.
    """
    require_lower_rank(rank)
    config = MergeConfig(weights=1.0, rank=rank, energy=energy, heads="average", base=base)
    return merge_adapters([adapter], config, output=output, overwrite=overwrite, progress=progress)


def require_lower_rank(rank: int | str) -> None:
    """Refuse a word that a merge's rank may be, and that makes no adapter smaller.

    Raises:
        MergeError: it is one.
    """
    if isinstance(rank, str) and rank != AUTO:
        raise MergeError(f"the rank '{rank}' is none: give a whole number, or '{AUTO}'.")
