"""What a start and its constraint are made of: one problem a distinct input, solved once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from orthomerge.adapters.config import OsrmConfig
from orthomerge.adapters.constrain import ADAPTER, Directions, lora_layers
from orthomerge.adapters.files import Adapter
from orthomerge.errors import StatisticsError, SubspaceError
from orthomerge.io.files import derive_seed
from orthomerge.moments import Moment, combine
from orthomerge.statistics import Statistics, combined_moment
from orthomerge.subspace import (
    Solver,
    Subspace,
    allocate_ranks,
    describe,
    dominant_directions,
    get_solver,
    orthonormal_rows,
    project_rows_out,
    quiet_directions,
)


def solve_layer(
    solver: Solver,
    layer: str,
    owner: str,
    rank: int,
    others: Sequence[Statistics],
    own: Statistics | None,
    config: OsrmConfig,
    existing: Sequence[Adapter],
) -> Subspace:
    """One distinct input's rows, on the right side of what the constraint keeps them out of."""
    moments = [item.moment(layer) for item in others]
    mine = own.moment(layer) if own is not None else None
    try:
        found = _free(solver, layer, owner, rank, moments, mine, config, existing)
        if config.constraint == "project":
            other = combine(moments, config.weights)
            if config.room is None:
                loud = _loud(other, rank, config.share)
                rows = _on_one_side(found.basis, lambda rows: project_rows_out(rows, loud))
            else:
                # Not every solver's few rows lie among its many: seeds and other tasks intervene.
                wide = max(config.room, rank)
                room = _free(solver, layer, owner, wide, moments, mine, config, existing).basis
                rows = _on_one_side(found.basis, lambda rows: (rows @ room.T) @ room)
            found = describe(rows, other, mine, found.admissible, found.cost.how)
    except SubspaceError as problem:
        raise SubspaceError(f"layer '{layer}': {problem}") from problem
    return found


def _on_one_side(rows: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]):
    """Orthonormal rows of what a projection leaves; twice, since that may be little at first."""
    for _ in range(2):
        rows = orthonormal_rows(project(rows))
    return rows


def _free(
    solver: Solver,
    layer: str,
    owner: str,
    rank: int,
    moments: Sequence[Moment],
    mine: Moment | None,
    config: OsrmConfig,
    existing: Sequence[Adapter],
) -> Subspace:
    """What the solver chooses, for this task or for all at once."""
    if solver.joint and not existing and mine is not None:
        return _solve_all(solver, moments, mine, rank, owner, config)
    other = combine(moments, config.weights)
    return solver(
        other,
        rank,
        own=mine,
        # Tasks that share a seed have other others: else they would draw nearly the same rows from
        # nearly the same null space.
        seed=derive_seed(config.seed, owner, f"{other.trace:.6e}"),
        taken=rows_of(existing, layer) if existing else None,
        **config.options,
    )


def _solve_all(
    solver: Solver,
    moments: Sequence[Moment],
    mine: Moment,
    rank: int,
    owner: str,
    config: OsrmConfig,
) -> Subspace:
    """All tasks at once, in the order of their energies, and the own one's rows of it."""
    weights = [1.0] * len(moments) if config.weights is None else list(config.weights)
    everyone = sorted(
        [(mine.trace, mine.count, True, mine, sum(weights) / len(weights))]
        + [(m.trace, m.count, False, m, w) for m, w in zip(moments, weights, strict=True)],
        key=lambda item: item[:2],
    )
    found = solver.for_all(
        [m for *_, m, _ in everyone],
        [rank] * len(everyone),
        seeds=[derive_seed(config.seed, owner, str(place)) for place in range(len(everyone))],
        weights=[w for *_, w in everyone],
        **config.options,
    )
    return found[next(i for i, item in enumerate(everyone) if item[2])]


def rows_of(adapters: Sequence[Adapter], layer: str) -> torch.Tensor | None:
    """The rows of all adapters' `A` at a layer, which adapters name below their head model."""
    rows = [
        adapter.layers[name].A
        for adapter in adapters
        for name in adapter.layers
        if name == layer or name.endswith(f".{layer}")
    ]
    return torch.cat([r.double() for r in rows]) if rows else None


def _loud(other: Moment, rank: int, share: float) -> torch.Tensor:
    return dominant_directions(other, share=share, most=other.dim - rank)


def layer_directions(
    layer: str,
    owner: str,
    rank: int,
    others: Sequence[Statistics],
    own: Statistics | None,
    config: OsrmConfig,
    existing: Sequence[Adapter] = (),
) -> torch.Tensor:
    """Of one layer: the others' loud directions or, with `config.room`, the solver's best ones."""
    if config.room is None:
        return _loud(combined_moment(others, layer, config.weights), rank, config.share)
    if config.room < rank:
        raise SubspaceError(
            f"layer '{layer}' has rank {rank}, more than the room of {config.room} directions: "
            "raise the room or lower the rank."
        )
    moments = [item.moment(layer) for item in others]
    mine = own.moment(layer) if own is not None else None
    solver = get_solver(config.solver)
    return _free(solver, layer, owner, config.room, moments, mine, config, existing).basis


def kept_out_directions(
    peft_model: PeftModel,
    others: Sequence[Statistics | str | Path],
    own: Statistics | str | Path | None,
    config: OsrmConfig,
    *,
    existing: Sequence[Adapter] = (),
    adapter_name: str = ADAPTER,
) -> Directions:
    """What the constraint "project" keeps every `A` out of, for `Projection`.

    The directions that hold `config.share` of the others' energy, at least `rank` dimensions left
    free; or with `config.room` everything outside the `room` best directions of the solver, which
    for `min_eigen` are the quietest ones. Layers that read one input share one tensor.

    Raises:
        StatisticsError: no others, or a file that cannot be read.
        SubspaceError: a room smaller than the rank or larger than the layer.
    """
    if not others:
        raise StatisticsError("the constraint 'project' needs statistics of at least one other.")
    others = [Statistics.of(item) for item in others]
    own = Statistics.of(own) if own is not None else None
    found: dict[str, torch.Tensor] = {}
    by_owner: dict[tuple[str, int, str], torch.Tensor] = {}
    for layer, module in lora_layers(peft_model, adapter_name).items():
        rank = module.lora_A[adapter_name].weight.shape[0]
        owner = others[0].layers.get(layer, layer)
        # With a room, layers of any rank share it; without one the rank must stay free.
        key = (owner, 0 if config.room else rank, layer if config.room and existing else "")
        if key not in by_owner:
            by_owner[key] = layer_directions(layer, owner, rank, others, own, config, existing)
        found[layer] = by_owner[key]
    return Directions(found, within=config.room is not None)


def plan_ranks(
    others: Sequence[Statistics], rank: int, energy: float, weights: Sequence[float] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks by layer where the others leave room, and the room: quiet directions by layer.

    A direction is quiet when the others' energy along it is at most `energy` times their mean.
    What crowded layers give up goes to those with room (`subspace.allocate_ranks`); the ranks go
    into PEFT's `rank_pattern` (`new_lora(ranks=...)`).

    Raises:
        StatisticsError: no others.
        SubspaceError: an energy that is not positive.
    """
    if not others:
        raise StatisticsError("ranks by room need statistics of at least one other task.")
    room: dict[str, int] = {}
    by_owner: dict[str, int] = {}
    for layer, owner in others[0].layers.items():
        if owner not in by_owner:
            by_owner[owner] = quiet_directions(combined_moment(others, layer, weights), energy)
        room[layer] = by_owner[owner]
    return allocate_ranks(room, rank), room
