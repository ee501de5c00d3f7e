"""How many low-energy directions a layer has, and ranks allocated by how many there are."""

from __future__ import annotations

from collections.abc import Mapping

from orthomerge import linalg
from orthomerge.errors import SubspaceError
from orthomerge.moments import Moment
from orthomerge.subspace.row_space import RowSpace, factored


def low_energy_directions(other: Moment, energy: float) -> int:
    """The number of eigen-directions of `S_other` with at most `energy` times the mean energy.

    O(d_in³), or O(k² d_in) for features of k rows.

    Raises:
        SubspaceError: an `energy` that is not positive.
    """
    if not energy > 0:
        raise SubspaceError(f"the low energy must be positive, not {energy}: 0.1 is a start.")
    limit = energy * other.trace / other.dim
    few = factored(other)
    if few is not None:
        space = RowSpace(few, 0.0)
        return other.dim - space.dim + int((space.values <= limit).sum())
    return int((linalg.eigvalsh(other.matrix) <= limit).sum())


def allocate_ranks(
    free: Mapping[str, int], rank: int, *, most: int | None = None
) -> dict[str, int]:
    """Ranks by layer: at most its free directions, with a mean of `rank` where possible.

    `free` counts each layer's low-energy directions. A layer without any still gets rank 1, since
    PEFT has no rank 0. What crowded layers give up goes one by one to the layer with most free
    directions for each rank it has, up to `most` (by default four times `rank`).

    Raises:
        SubspaceError: a rank below 1, or `most` below `rank`.
    """
    most = 4 * rank if most is None else most
    if rank < 1 or most < rank:
        raise SubspaceError(f"rank {rank} and most {most} must satisfy 1 <= rank <= most.")
    ranks = {layer: max(min(rank, count), 1) for layer, count in free.items()}
    spare = rank * len(free) - sum(ranks.values())
    while spare > 0:
        open_layers = {n: free[n] / r for n, r in ranks.items() if r < min(free[n], most)}
        if not open_layers:
            break
        widest = max(open_layers, key=lambda n: (open_layers[n], -ranks[n]))
        ranks[widest] += 1
        spare -= 1
    return ranks
