"""Distillation: merged factors trained to give each adapter's own answers, without labels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.training.distillation.distill import Distilled, Measured, distill_adapters
    from orthomerge.training.distillation.settings import PROBLEMS, DistillSettings

__all__ = ["PROBLEMS", "DistillSettings", "Distilled", "Measured", "distill_adapters"]

# Imported when first used: the Trainer takes seconds to import.
_HOMES = {
    "PROBLEMS": "settings",
    "DistillSettings": "settings",
    "Distilled": "distill",
    "Measured": "distill",
    "distill_adapters": "distill",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orthomerge.training.distillation' has no '{name}'")
    return getattr(import_module(f"orthomerge.training.distillation.{_HOMES[name]}"), name)
