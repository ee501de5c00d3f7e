"""Solves for `A` and for what its constraint excludes, once per distinct layer input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from orthomerge.adapters.config import OsrmConfig
from orthomerge.adapters.constrain import ADAPTER, Directions, lora_layers
from orthomerge.adapters.files import Adapter
from orthomerge.errors import StatisticsError, SubspaceError
from orthomerge.io.files import derive_seed
from orthomerge.moments import Moment, combine
from orthomerge.statistics import Statistics, combined_moment
from orthomerge.subspace import (
    Subspace,
    allocate_ranks,
    describe,
    dominant_directions,
    get_solver,
    low_energy_directions,
    orthonormal_rows,
    project_rows_out,
)

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class LayerProblem:
    """One layer's question: which rows `A` gets, and which directions "project" excludes.

    `layer` is the name below the head, `owner` the first layer that reads the same input. The
    others' moment is combined and decomposed once for both answers; `release` lets it go, since a
    model has many layers.
    """

    layer: str
    owner: str
    rank: int
    others: Sequence[Statistics]
    own: Statistics | None
    config: OsrmConfig
    existing: Sequence[Adapter] = ()

    @cached_property
    def solution(self) -> Subspace:
        """The rows of the solver, on the right side of what the constraint excludes.

        Raises:
            SubspaceError: what the solver refuses, with the layer's name.
        """
        try:
            found = self._solver_rows(self.rank)
            if self.config.constraint == "project":
                rows = _on_one_side(found.basis, self._project)
                found = describe(rows, self._other, self._mine, found.admissible, found.cost.how)
        except SubspaceError as problem:
            raise SubspaceError(f"layer '{self.layer}': {problem}") from problem
        return found

    @cached_property
    def directions(self) -> torch.Tensor:
        """What "project" keeps `A` out of: the others' dominant directions, `rank` left free.

        With `config.subspace_dim` it is what `A` stays within: so many best rows of the solver.

        Raises:
            SubspaceError: a `subspace_dim` below the rank.
        """
        dim = self.config.subspace_dim
        if dim is None:
            most = self._other.dim - self.rank
            return dominant_directions(self._other, share=self.config.energy_fraction, most=most)
        if dim < self.rank:
            raise SubspaceError(
                f"it has rank {self.rank}, more than the subspace_dim of {dim}: raise the "
                "subspace_dim or lower the rank."
            )
        return self._solver_rows(dim).basis

    def release(self) -> None:
        """Keep the answers alone."""
        for name in ("_moments", "_mine", "_other"):
            self.__dict__.pop(name, None)

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        if self.config.subspace_dim is None:
            return project_rows_out(rows, self.directions)
        # Not every solver's few rows lie among its many: seeds and other tasks intervene.
        return (rows @ self.directions.T) @ self.directions

    @cached_property
    def _moments(self) -> list[Moment]:
        return [item.moment(self.layer) for item in self.others]

    @cached_property
    def _mine(self) -> Moment | None:
        return self.own.moment(self.layer) if self.own is not None else None

    @cached_property
    def _other(self) -> Moment:
        return combine(self._moments, self.config.weights)

    def _solver_rows(self, rank: int) -> Subspace:
        """What the solver chooses, for this task or for all at once."""
        solver = get_solver(self.config.solver)
        if solver.joint and not self.existing and self._mine is not None:
            return self._solve_all(self._mine, rank)
        return solver(
            self._other,
            rank,
            own=self._mine,
            # Tasks that share a seed have other others: else they would draw nearly the same rows
            # from nearly the same null space.
            seed=derive_seed(self.config.seed, self.owner, f"{self._other.trace:.6e}"),
            taken=rows_of(self.existing, self.layer) if self.existing else None,
            **self.config.options,
        )

    def _solve_all(self, mine: Moment, rank: int) -> Subspace:
        """All tasks at once, in the order of their energies, and the own one's rows of it."""
        given = self.config.weights
        weights = [1.0] * len(self._moments) if given is None else list(given)
        everyone = sorted(
            [(mine.trace, mine.count, True, mine, sum(weights) / len(weights))]
            + [
                (m.trace, m.count, False, m, w) for m, w in zip(self._moments, weights, strict=True)
            ],
            key=lambda item: item[:2],
        )
        found = get_solver(self.config.solver).for_all(
            [m for *_, m, _ in everyone],
            [rank] * len(everyone),
            seeds=[
                derive_seed(self.config.seed, self.owner, str(place))
                for place in range(len(everyone))
            ],
            weights=[w for *_, w in everyone],
            **self.config.options,
        )
        return found[next(i for i, item in enumerate(everyone) if item[2])]


def _on_one_side(rows: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]):
    """Orthonormal rows of what a projection leaves; twice, since that may be little at first."""
    for _ in range(2):
        rows = orthonormal_rows(project(rows))
    return rows


def rows_of(adapters: Sequence[Adapter], layer: str) -> torch.Tensor | None:
    """The rows of all adapters' `A` at a layer, which adapters name below their head model."""
    rows = [
        adapter.layers[name].A
        for adapter in adapters
        for name in adapter.layers
        if name == layer or name.endswith(f".{layer}")
    ]
    return torch.cat([r.double() for r in rows]) if rows else None


def layer_problems(
    peft_model: PeftModel,
    others: Sequence[Statistics],
    own: Statistics | None,
    config: OsrmConfig,
    *,
    existing: Sequence[Adapter] = (),
    adapter_name: str = ADAPTER,
) -> dict[str, LayerProblem]:
    """Every adapted layer with its problem; layers that read one input at one rank share it.

    With `existing` adapters each layer has its own, since their rows there differ.
    """
    found: dict[str, LayerProblem] = {}
    shared: dict[tuple[str, int, str], LayerProblem] = {}
    for layer, module in lora_layers(peft_model, adapter_name).items():
        rank = module.lora_A[adapter_name].weight.shape[0]
        owner = others[0].layers.get(layer, layer)
        key = (owner, rank, layer if existing else "")
        if key not in shared:
            shared[key] = LayerProblem(layer, owner, rank, others, own, config, existing)
        found[layer] = shared[key]
    return found


def excluded_directions(
    peft_model: PeftModel,
    others: Sequence[Statistics | str | Path],
    own: Statistics | str | Path | None,
    config: OsrmConfig,
    *,
    existing: Sequence[Adapter] = (),
    adapter_name: str = ADAPTER,
) -> Directions:
    """What the constraint "project" excludes from every `A`, for `Projection`, without a start.

    `orthomerge.prepare` starts an adapter and computes the directions in one call. They hold
    `config.energy_fraction` of the others' energy, with at least `rank` dimensions left free; with
    `config.subspace_dim` they are everything outside so many best directions of the solver, which
    for `min_eigen` are those of least energy. Layers that read one input share one tensor.

    Raises:
        StatisticsError: no others, or a file that cannot be read.
        SubspaceError: a `subspace_dim` below the rank or above the layer's width.
    """
    if not others:
        raise StatisticsError("the constraint 'project' needs statistics of at least one other.")
    read = [Statistics.of(item) for item in others]
    mine = Statistics.of(own) if own is not None else None
    problems = layer_problems(
        peft_model, read, mine, config, existing=existing, adapter_name=adapter_name
    )
    return directions_of(problems, config)


def directions_of(problems: Mapping[str, LayerProblem], config: OsrmConfig) -> Directions:
    """The excluded directions of layers that are being solved."""
    rows: dict[str, torch.Tensor] = {}
    for name, problem in problems.items():
        try:
            rows[name] = problem.directions
        except SubspaceError as found:
            raise SubspaceError(f"layer '{name}': {found}") from found
        problem.release()
    return Directions(rows, within=config.subspace_dim is not None)


def plan_ranks(
    others: Sequence[Statistics], rank: int, energy: float, weights: Sequence[float] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks by layer, allocated by low-energy directions, and the number of those by layer.

    A direction has low energy when the others' energy along it is at most `energy` times their
    mean. `subspace.allocate_ranks` says which layer gets which rank; the ranks go into PEFT's
    `rank_pattern` (`new_lora(ranks=...)`).

    Raises:
        StatisticsError: no others.
        SubspaceError: an energy that is not positive.
    """
    if not others:
        raise StatisticsError(
            "ranks by low-energy directions need statistics of at least one other task."
        )
    free: dict[str, int] = {}
    by_owner: dict[str, int] = {}
    for layer, owner in others[0].layers.items():
        if owner not in by_owner:
            by_owner[owner] = low_energy_directions(combined_moment(others, layer, weights), energy)
        free[layer] = by_owner[owner]
    return allocate_ranks(free, rank), free
