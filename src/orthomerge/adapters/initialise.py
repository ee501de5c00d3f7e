"""Starts: where `A` begins. The orthogonal ones, PEFT's own, and the controls between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from orthomerge.adapters.config import OsrmConfig
from orthomerge.adapters.constrain import ADAPTER, Directions, lora_layers, write_kept_out
from orthomerge.adapters.files import Adapter
from orthomerge.errors import AdapterError, StatisticsError, SubspaceError
from orthomerge.features import Statistics, describe_model, target_layers
from orthomerge.files import atomic_path, derive_seed
from orthomerge.moments import Moment, combine
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


def new_lora(
    model: Any,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    task_type: str | None = None,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
) -> PeftModel:
    """A PEFT model with fresh LoRA layers by PEFT's own start, drawn under `seed`.

    `ranks` gives single layers (named below the head) a rank of their own; their alpha follows, so
    that the scaling is the same everywhere.

    Raises:
        UnknownNameError: a target matches no layer; the message names the linear layers.
    """
    target_layers(model, targets)
    odd = {layer: r for layer, r in (ranks or {}).items() if r != rank}
    power = 0.5 if rslora else 1.0
    alphas = {layer: alpha * (r / rank) ** power for layer, r in odd.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (PEFT takes fractions too)
        lora_dropout=dropout,
        use_rslora=rslora,
        rank_pattern=odd,
        alpha_pattern=alphas,
        target_modules=list(targets),
        task_type=task_type,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def check_statistics(model: nn.Module, statistics: Statistics, name: str) -> None:
    """Refuse statistics of another model.

    Raises:
        StatisticsError: the hash of the model's configuration differs.
    """
    here = describe_model(model)
    if here["config_hash"] != statistics.meta.config_hash:
        raise StatisticsError(
            f"{name} was collected on '{statistics.meta.model_id}', which is another model than "
            f"'{here['model_id']}': collect it on this one."
        )


def initialize_osrm_weights(
    peft_model: PeftModel,
    others: Sequence[Statistics],
    own: Statistics | None = None,
    config: OsrmConfig | None = None,
    *,
    existing: Sequence[Adapter] = (),
    adapter_name: str = ADAPTER,
) -> dict[str, Subspace]:
    """Set every `A` into the subspace where the other tasks' inputs have least energy, `B` to 0.

    OSRM (arXiv 2505.22934, equation 4): `min ‖A H_otherᵀ‖²_F  s.t. A Aᵀ = I`. Nothing else of the
    model changes, so any PEFT trainer goes on from here; with the constraint "project"
    `kept_out_directions` says what `Projection` keeps `A` out of. Without a `config` it is the
    recommended one where `own` is given, else the paper's. Returns what was chosen, by layer.

    `existing` are adapters of other tasks, trained already: a joint solver keeps away from the rows
    of their `A` and leaves them as they are. Without them it chooses for all tasks at once, in an
    order that depends on the statistics alone, so that every team comes to the same choice.
    What is drawn is drawn under `config.seed`, the layer and the others' energy, so that tasks
    which share a seed do not share their rows.

    Raises:
        StatisticsError: no others, statistics of another model, granularity or target set, or
            weights that are not one a task.
        SubspaceError: the rank is larger than the admissible subspace, or a solver that does not
            look at other adapters was given some.
        AdapterError: adapters that exist, but not at any of these layers.
    """
    if config is None:
        config = OsrmConfig() if own is None else OsrmConfig.recommended()
    if not others:
        raise StatisticsError("an orthogonal start needs statistics of at least one other task.")
    _check_all(peft_model, others, own, config)
    solver = get_solver(config.solver)
    if existing and not solver.joint:
        raise SubspaceError(
            f"the solver '{solver.name}' does not look at other adapters: use 'joint'."
        )
    layers = lora_layers(peft_model, adapter_name)
    if existing and all(_rows_of(existing, name) is None for name in layers):
        raise AdapterError(
            f"the adapters that exist adapt no layer that this start does ({next(iter(layers))}, "
            "say): they belong to another model or other target modules."
        )
    if solver.needs_own and own is None:
        raise SubspaceError(
            f"the solver '{solver.name}' needs the task's own statistics: pass own=, or --own."
        )
    chosen: dict[str, Subspace] = {}
    solved: dict[tuple[str, int, str], Subspace] = {}
    for name, layer in layers.items():
        rank = layer.lora_A[adapter_name].weight.shape[0]
        # Layers that read one input share a solution, unless the adapters beside them differ.
        key = (others[0].layers.get(name, name), rank, name if existing else "")
        if key not in solved:
            solved[key] = _solve(solver, name, key[0], rank, others, own, config, existing)
        chosen[name] = solved[key]
    for name, layer in layers.items():  # all of them or none
        _set(layer, adapter_name, chosen[name].basis)
    return chosen


def _check_all(
    model: nn.Module, others: Sequence[Statistics], own: Statistics | None, config: OsrmConfig
) -> None:
    if config.weights is not None and len(config.weights) != len(others):
        raise StatisticsError(
            f"{len(config.weights)} weights for {len(others)} other tasks: give one a task."
        )
    for index, item in enumerate([*others, own] if own is not None else others):
        check_statistics(model, item, f"statistics {index + 1}")
        item.require_match(others[0], mine=f"statistics {index + 1}", theirs="statistics 1")
        if item.meta.granularity != config.granularity:
            raise StatisticsError(
                f"statistics {index + 1} have granularity '{item.meta.granularity}', the start "
                f"asks for '{config.granularity}': collect them with --granularity "
                f"{config.granularity}."
            )


def _solve(
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
        taken=_rows_of(existing, layer) if existing else None,
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


def _rows_of(adapters: Sequence[Adapter], layer: str) -> torch.Tensor | None:
    """The rows of all adapters' `A` at a layer, which adapters name below their head model."""
    rows = [
        factors.A
        for adapter in adapters
        for name, factors in adapter.layers.items()
        if name == layer or name.endswith(f".{layer}")
    ]
    return torch.cat([r.double() for r in rows]) if rows else None


def _loud(other: Moment, rank: int, share: float) -> torch.Tensor:
    return dominant_directions(other, share=share, most=other.dim - rank)


def kept_out_directions(
    peft_model: PeftModel,
    others: Sequence[Statistics],
    own: Statistics | None,
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
        SubspaceError: a room smaller than the rank or larger than the layer.
    """
    solver = get_solver(config.solver)
    found: dict[str, torch.Tensor] = {}
    by_owner: dict[tuple[str, int, str], torch.Tensor] = {}
    for layer, module in lora_layers(peft_model, adapter_name).items():
        rank = module.lora_A[adapter_name].weight.shape[0]
        owner = others[0].layers.get(layer, layer)
        if config.room is not None and config.room < rank:
            raise SubspaceError(
                f"layer '{layer}' has rank {rank}, more than the room of {config.room} directions: "
                "raise the room or lower the rank."
            )
        # With a room, layers of any rank share it; without one the rank must stay free.
        key = (owner, 0 if config.room else rank, layer if config.room and existing else "")
        if key not in by_owner:
            moments = [item.moment(layer) for item in others]
            if config.room is None:
                by_owner[key] = _loud(combine(moments, config.weights), rank, config.share)
            else:
                mine = own.moment(layer) if own is not None else None
                by_owner[key] = _free(
                    solver, layer, owner, config.room, moments, mine, config, existing
                ).basis
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
            moment = combine([item.moment(layer) for item in others], weights)
            by_owner[owner] = quiet_directions(moment, energy)
        room[layer] = by_owner[owner]
    return allocate_ranks(room, rank), room


def unit_rows(peft_model: PeftModel, *, adapter_name: str = ADAPTER) -> None:
    """Rescale each row of every `A` to norm 1: PEFT's default start on equal terms with OSRM's."""
    for layer in lora_layers(peft_model, adapter_name).values():
        A = layer.lora_A[adapter_name].weight
        _set(layer, adapter_name, A.detach() / A.detach().norm(dim=1, keepdim=True))


def _set(layer: Any, adapter: str, rows: torch.Tensor) -> None:
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(rows)
        layer.lora_B[adapter].weight.zero_()


def save_start(
    peft_model: PeftModel,
    folder: str | Path,
    kept_out: Directions | None = None,
) -> Path:
    """Write a start as an ordinary PEFT folder, the fresh head of a classifier with it.

    PEFT refuses to load a classification adapter that lacks its head, so the head is kept; it
    loads with `PeftModel.from_pretrained(model, folder, is_trainable=True)` on a model with as
    many labels. `kept_out` are the directions a projected `A` stays out of
    (`kept_out_directions`); they lie beside the weights, where `read_kept_out` finds them.
    """
    with atomic_path(folder) as path:
        # Embeddings are never adapted here; left to itself PEFT asks the hub whether they changed.
        peft_model.save_pretrained(str(path), save_embedding_layers=False)
        if kept_out is not None:
            write_kept_out(path, kept_out)
    return Path(folder)


def load_trainable(model: Any, folder: str | Path) -> PeftModel:
    """A base model with the adapter of `folder` on it, ready to train."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def captured(chosen: Mapping[str, Subspace]) -> dict[str, dict[str, float | None]]:
    """Captured energies by layer, as plain numbers for a file or a table."""
    return {
        name: {"other": item.captured_other, "own": item.captured_own}
        for name, item in chosen.items()
    }
