"""Merge whole adapters, layer by layer, by one registered method."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

from orthomerge.factors import LoraFactors
from orthomerge.merging.config import MergeConfig
from orthomerge.merging.merged import MergedLayer, MergedUpdate
from orthomerge.merging.plan import MergePlan, plan_merge
from orthomerge.merging.registry import Update


def merge_layers(
    adapters: Sequence[Mapping[str, LoraFactors]], config: MergeConfig | None = None, **how: Any
) -> MergedUpdate:
    """Merge N adapters, each a mapping from layer name to factors, by a registered method.

    All of `iter_merge` at once; the arguments and errors are the same.
    """
    layers: dict[str, Update] = {}
    errors: dict[str, float] = {}
    tasks: tuple[dict[str, Update], ...] = ()
    plan, run = _planned(adapters, config, **how)
    for layer in run:
        layers[layer.name] = layer.update
        if layer.truncation_error is not None:
            errors[layer.name] = layer.truncation_error
        if layer.tasks:
            tasks = tasks or tuple({} for _ in layer.tasks)
            for own, update in zip(tasks, layer.tasks, strict=True):
                own[layer.name] = update
    return MergedUpdate(layers, plan.config.method, errors, tasks, plan.config)


def iter_merge(
    adapters: Sequence[Mapping[str, LoraFactors]], config: MergeConfig | None = None, **how: Any
) -> Iterator[MergedLayer]:
    """The merged layers one after the other, so that no more than a few are in memory at once.

    `W_merged[layer] = method([ΔW_1[layer], ..., ΔW_N[layer]], weights)` for the union of the layer
    names; a layer that an adapter lacks counts as a zero update there. Computed in float32 or
    better; results have the adapters' dtype and device. Cost: the method's, a layer; truncating
    factors O((d_in + d_out) R² + R³), a dense result O(d_out d_in min(d)).

    Args:
        adapters: mappings from layer name to factors; a lazy mapping is read a layer at a time.
        config: what is asked of the merge; without a rank, nothing is cut.
        how: the fields of a `MergeConfig` (`method="ties"`) and options of the method
            (`density=0.2`), in place of a config or to change it. Then what the method needs:
            `statistics`, each adapter's, and `fisher`, each adapter's diagonal Fisher information
            by layer. And how it is run: `workers`, layers merged in parallel, in threads that take
            one core each; `devices` that take layers in parallel (results come back where the
            adapters are); `progress`, called with the number of layers done and their total.

    Raises:
        UnknownNameError: no such method.
        MergeError: no adapters; weights that do not match; an unknown option or a bad value;
            layers whose shapes or devices differ; factors that are not finite; statistics or
            Fisher information that a method needs and does not get.
    """
    return _planned(adapters, config, **how)[1]


def _planned(
    adapters: Sequence[Mapping[str, LoraFactors]],
    config: MergeConfig | None,
    *,
    workers: int = 1,
    devices: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> tuple[MergePlan, Iterator[MergedLayer]]:
    """The merge, found to be well defined, and its layers."""
    plan = plan_merge(adapters, config, **asked)
    return plan, _run(plan, max(workers, len(devices)), list(devices), progress)


def _run(
    plan: MergePlan, workers: int, devices: list[str], progress: Callable[[int, int], None] | None
) -> Iterator[MergedLayer]:
    total = len(plan.names)
    layers = (
        (plan.merge(name) for name in plan.names)
        if workers <= 1 and not devices
        else _side_by_side(plan, workers, devices)
    )
    for done, layer in enumerate(layers, start=1):
        if progress is not None:
            progress(done, total)
        yield layer


def _side_by_side(plan: MergePlan, workers: int, devices: list[str]) -> Iterator[MergedLayer]:
    """The layers in order, `workers` of them at work, and no more than as many waiting."""
    free: SimpleQueue[str | None] = SimpleQueue()
    for number in range(workers):
        free.put(devices[number % len(devices)] if devices else None)

    def work(name: str) -> MergedLayer:
        device = free.get()
        try:
            return plan.merge(name, device)
        finally:
            free.put(device)

    waiting: deque[Future[MergedLayer]] = deque()
    with _single_threaded(), ThreadPoolExecutor(workers) as pool:
        try:
            for name in plan.names:
                waiting.append(pool.submit(work, name))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _single_threaded() -> Generator[None, None, None]:
    """One thread per operation while several layers are merged in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
