"""Adapters that exist already, moved out of what other tasks' inputs occupy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from orthomerge.adapters.config import ConvertConfig
from orthomerge.adapters.constrain import Directions, write_excluded
from orthomerge.adapters.files import Adapter, read_adapter
from orthomerge.adapters.keys import parse_keys
from orthomerge.adapters.output import distinct_names
from orthomerge.adapters.refit import Loss, measure, refit_low_energy, refit_rows, refit_within
from orthomerge.adapters.solve import LayerProblem
from orthomerge.adapters.statistics import beside_files, require_base
from orthomerge.adapters.tokenizers import put_tokenizer
from orthomerge.errors import AdapterError, StatisticsError, SubspaceError
from orthomerge.factors import LoraFactors
from orthomerge.io.files import atomic_path, copy_inside
from orthomerge.io.names import CONFIG, CONVERT, HEAD, HEADS, WEIGHTS
from orthomerge.io.outputs import require_apart, require_free
from orthomerge.io.tensors import TensorWriter, open_tensors, read_tensor, require_finite
from orthomerge.records import about_adapter, about_base, converted_card, seal, sources_of, versions
from orthomerge.statistics import Statistics, combined_moment
from orthomerge.subspace import get_solver

RECORD = CONVERT


class Converted(NamedTuple):
    """One adapter converted: its name, its folder, and what was lost by layer."""

    name: str
    path: Path
    layers: dict[str, Loss]

    @property
    def total(self) -> Loss:
        """Over all layers."""
        return total_loss(self.layers.values())


def total_loss(losses: Any) -> Loss:
    """The sum of what several layers lost."""
    total, *rest = losses
    for item in rest:
        total = total + item
    return total


def convert_adapters(
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    statistics: Sequence[str | Path | Statistics] = (),
    others: Sequence[str | Path | Statistics] = (),
    config: ConvertConfig | None = None,
    base: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Converted]:
    """Convert adapters that exist already, so that they disturb each other less in a merge.

    `ΔW = s B A` becomes `ΔW' = s B' A'` of the same rank and scaling, whose rows avoid the other
    tasks' inputs while the own task's outputs stay as they were as far as that goes (see
    `orthomerge.adapters.refit`). Everything else in the folder is kept: heads, biases, rank and
    alpha patterns, rsLoRA.

    Args:
        adapters: PEFT folders or hub ids; every one's others are the rest.
        output: the folder to write; with several adapters one folder for each below it. It appears
            whole or not at all.
        statistics: each adapter's own, in order; only for a refit of "weights" without.
        others: statistics of further tasks.
        config: how to convert.
        base: the base model's folder or id, to hold the statistics to.
        overwrite: replace an output folder that orthomerge wrote.
        progress: called with the number of layers done and their total.

    Raises:
        AdapterError: no adapters, ones that are not in a folder, DoRA or adapted embeddings.
        OutputError: an output that is not free, or that overlaps with an input or the base.
        StatisticsError: not one own an adapter, no others, statistics of another model, or a layer
            without any.
        SubspaceError: what the solver refuses.
    """
    how = config or ConvertConfig()
    inputs = [*adapters, *statistics, *others]
    require_free(output, inputs=inputs, base=base, overwrite=overwrite)
    read = [a if isinstance(a, Adapter) else read_adapter(a, base=base) for a in adapters]
    for adapter in read:
        require_apart(output, base=adapter.base_model)
    own, more = [beside_files(s) for s in statistics], [beside_files(s) for s in others]
    _check(read, own, more, how)
    first, *_ = [*own, *more]
    known: str | None = None
    for name, item in [*_called(statistics, own), *_called(others, more)]:
        known = require_base(item, name, read[0], base, first=first)
        item.require_match(first, mine=name, theirs="the first statistics")
    names = distinct_names(read)
    of_base = [about_base(base, a.base_model, known) for a in read]
    size, done = sum(len(a.layers) for a in read), 0
    mine, rest = sources_of(statistics), sources_of(others)
    found: list[Converted] = []
    with atomic_path(output) as folder:
        for place, (adapter, name) in enumerate(zip(read, names, strict=True)):
            work = _Conversion(
                adapter, own[place] if own else None,
                [s for u, s in enumerate(own) if u != place] + more, how,
            )  # fmt: skip
            target, at = (folder, Path(output)) if len(read) == 1 else (
                folder / name, Path(output) / name,
            )  # fmt: skip
            sources = {
                "own": mine[place : place + 1],
                "others": [s for u, s in enumerate(mine) if u != place] + rest,
            }
            for _ in work.write(target, {**of_base[place], "statistics": sources}):
                done += 1
                if progress is not None:
                    progress(done, size)
            found.append(Converted(name, at, work.losses))
    return found


def _called(
    items: Sequence[str | Path | Statistics], read: Sequence[Statistics]
) -> list[tuple[str, Statistics]]:
    return [
        ("statistics" if isinstance(s, Statistics) else f"'{s}'", r)
        for s, r in zip(items, read, strict=True)
    ]


def _check(
    adapters: Sequence[Adapter],
    own: Sequence[Statistics],
    more: Sequence[Statistics],
    config: ConvertConfig,
) -> None:
    if not adapters:
        raise AdapterError("nothing to convert: name at least one adapter folder.")
    if own and len(own) != len(adapters):
        raise StatisticsError(
            f"{len(own)} own statistics for {len(adapters)} adapters: give one for each, in order "
            "(--stats)."
        )
    if not own and (len(adapters) > 1 or config.refit == "outputs"):
        raise StatisticsError(
            "each adapter's own statistics are needed to keep its outputs and to tell the others': "
            "give one for each (--stats), or convert one adapter with --subspace project --refit "
            "weights."
        )
    if not more and len(own) < 2:
        raise StatisticsError(
            "there are no other tasks to keep clear of: name their statistics (--others), or "
            "convert several adapters at once."
        )
    if not own and get_solver(config.solver).needs_own and config.subspace == "start":
        raise StatisticsError(f"the solver '{config.solver}' needs the own statistics (--stats).")
    for adapter in adapters:
        if adapter.path is None:
            raise AdapterError(
                f"'{adapter.called}' is in memory only: save it to a folder and name that."
            )
        if adapter.config.get("use_dora"):
            raise AdapterError(
                f"'{adapter.called}' is a DoRA adapter, whose update has no low rank to convert: "
                "merge it as it is, or train it without DoRA."
            )
        if adapter.kernels:
            raise AdapterError(
                f"'{adapter.called}' adapts '{next(iter(adapter.kernels))}', a convolution, "
                "whose inputs no statistics cover: it cannot be converted."
            )
        if adapter.parameters:
            raise AdapterError(
                f"'{adapter.called}' adapts '{next(iter(adapter.parameters))}' by "
                "target_parameters: such cannot be converted."
            )
        if adapter.embeddings:
            raise AdapterError(
                f"'{adapter.called}' adapts '{next(iter(adapter.embeddings))}', an embedding, "
                "whose inputs no statistics cover: it cannot be converted."
            )


class _Conversion:
    """One adapter being converted, a layer at a time."""

    def __init__(
        self,
        adapter: Adapter,
        own: Statistics | None,
        others: Sequence[Statistics],
        config: ConvertConfig,
    ) -> None:
        self._adapter, self._own, self._others, self._config = adapter, own, others, config
        self._shared: dict[tuple[str, int], Any] = {}
        self._excluded: dict[str, Any] = {}
        self.losses: dict[str, Loss] = {}

    def write(self, folder: Path, sources: Mapping[str, Any]):
        """Write the folder, `sources` into its record; yields after every layer."""
        adapter, source = self._adapter, self._adapter.path
        assert source is not None
        folder.mkdir(parents=True)
        stored = open_tensors(source / WEIGHTS)
        ready: dict[str, LoraFactors] = {}
        keys = parse_keys(stored, adapter.called)
        plain = [meaning.plain for meaning in keys.values()]
        with TensorWriter(folder / WEIGHTS, plain) as file:
            for key, entry in stored.items():
                meaning = keys.get(key)
                if meaning is None or meaning.part not in ("A", "B"):
                    if meaning is not None:
                        whole = read_tensor(entry)
                        file.add(meaning.plain, require_finite(whole, f"'{key}'", adapter.called))
                    continue
                layer, side = meaning.name, meaning.part
                if layer in ready:  # PEFT writes both halves of a layer in sequence
                    factors = ready.pop(layer)
                else:
                    factors = ready[layer] = self._convert(layer)
                    yield layer
                half = factors.A if side == "A" else factors.B.to(read_tensor(entry).dtype)
                file.add(meaning.plain, half)
        copy_inside(source / CONFIG, folder / CONFIG, source)
        put_tokenizer(source, folder)
        if (source / HEADS).is_dir():
            (folder / HEADS).mkdir()
            for head in sorted((source / HEADS).glob(f"*{HEAD}")):
                copy_inside(head, folder / HEADS / head.name, source)
        if self._excluded:
            within = self._config.subspace_dim is not None
            write_excluded(folder, Directions(self._excluded, within=within))
        record = self._record(sources)
        card = converted_card(record, adapter.config.get("task_type"))
        (folder / "README.md").write_text(card, encoding="utf-8")
        seal(folder, RECORD, record)

    def _convert(self, layer: str) -> LoraFactors:
        before = self._adapter.layers[layer]
        own = self._own.moment(layer) if self._own is not None else None
        others = combined_moment(self._others, layer)
        try:
            after = self._refit(layer, before, own, others)
        except SubspaceError as problem:
            raise SubspaceError(
                f"'{self._adapter.called}', layer '{layer}': {problem}"
            ) from problem
        self.losses[layer] = measure(before, after, own, others)
        return after

    def _refit(self, layer: str, before: LoraFactors, own: Any, others: Any) -> LoraFactors:
        how = self._config
        if how.subspace == "low_energy":
            return refit_low_energy(before, own, others, balance=how.balance, ridge=how.ridge)
        kept = own if how.refit == "outputs" else None
        first = self._others[0]
        known = first.name_of(layer)
        key = (first.layers[known], before.rank)  # layers that read one input share a solution
        start = how.start(first.meta.granularity)
        problem = LayerProblem(layer, key[0], before.rank, self._others, self._own, start)
        if how.subspace == "project":
            if key not in self._shared:
                self._shared[key] = problem.directions
            directions = self._excluded[known] = self._shared[key]
            within = how.subspace_dim is not None
            return refit_within(before, directions, kept, within=within, ridge=how.ridge)
        if key not in self._shared:
            self._shared[key] = problem.solution.basis
        return refit_rows(before, self._shared[key], kept, ridge=how.ridge)

    def _record(self, sources: Mapping[str, Any]) -> dict[str, Any]:
        adapter = self._adapter
        return {
            "adapter": about_adapter(adapter.name, adapter),
            "config": asdict(self._config),
            **sources,
            "total": described(total_loss(self.losses.values())),
            "layers": {name: described(loss) for name, loss in self.losses.items()},
            "versions": versions(),
        }


def described(loss: Loss) -> dict[str, float | None]:
    """A loss as plain numbers for a file or a table; None where there are no own statistics."""
    values = {
        "lost_weights": loss.share_of_weights,
        "lost_outputs": loss.share_of_outputs,
        "others_hear_before": loss.heard_before,
        "others_hear_after": loss.heard_after,
        "others_hear_still": loss.heard_still,
    }
    return {name: None if math.isnan(v) else v for name, v in values.items()}
