"""What becomes of task heads and other `modules_to_save` in a merge: kept, averaged or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.files import Adapter
from orthomerge.errors import AdapterError
from orthomerge.io.files import slug
from orthomerge.io.tensors import shapes_of
from orthomerge.merging import HEADS

POLICIES = HEADS


def check_heads(adapters: Sequence[Adapter], policy: str) -> None:
    """Refuse heads that cannot be treated as the user asks, before any work.

    Raises:
        AdapterError: heads though they are refused, or heads of different shapes that should be
            averaged.
    """
    if policy == "refuse":
        for adapter in adapters:
            if adapter.modules:
                raise AdapterError(
                    f"'{adapter.called}' carries '{next(iter(adapter.modules))}' beside its LoRA "
                    "layers: keep such heads apart with --heads keep, or average them."
                )
    if policy == "average":
        _require_equal_shapes(adapters)


def _require_equal_shapes(adapters: Sequence[Adapter]) -> None:
    seen: dict[str, tuple[Adapter, tuple[int, ...]]] = {}
    for adapter in adapters:
        for name, shape in shapes_of(adapter.modules).items():
            known, expected = seen.setdefault(name, (adapter, shape))
            if shape != expected:
                raise AdapterError(
                    f"'{name}' is {list(expected)} in '{known.called}' and {list(shape)} in "
                    f"'{adapter.called}', so it cannot be averaged: use --heads keep."
                )


def label_count(shapes: Mapping[str, tuple[int, ...]], task_type: str | None) -> int | None:
    """How many labels a classifier's head tells apart: its narrowest layer is the last."""
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    rows = [s[0] for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2]
    return min(rows, default=None)


class AveragedModules(Mapping[str, Tensor]):
    """The plain mean of every module over the adapters that have it, worked out when asked for."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._modules = [adapter.modules for adapter in adapters if adapter.modules]
        self._names = list(dict.fromkeys(name for modules in self._modules for name in modules))

    def __getitem__(self, name: str) -> Tensor:
        found = [modules[name] for modules in self._modules if name in modules]
        if not found:
            raise KeyError(name)
        if not found[0].is_floating_point():
            return found[0]
        total = sum((t.double() for t in found), start=torch.zeros_like(found[0]).double())
        return (total / len(found)).to(found[0].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def saved_modules(adapters: Sequence[Adapter], modules: Mapping[str, Tensor]) -> list[str] | None:
    """What PEFT's `modules_to_save` must say so that these modules are loaded."""
    named = {name for a in adapters for name in a.config.get("modules_to_save") or ()}
    there = {part for name in modules for part in name.split(".")}
    dotted = {n for n in named if "." in n and any(f"{n}." in f"{name}." for name in modules)}
    return sorted((named & there) | dotted) or None


def described_head(name: str, adapter: Adapter) -> dict[str, Any] | None:
    """The name of a head's file and how many labels it tells apart, None where there is none."""
    shapes = shapes_of(adapter.modules)
    if not shapes:
        return None
    return {"name": slug(name), "labels": label_count(shapes, adapter.config.get("task_type"))}
