"""Distillation: merged factors trained to give each adapter's own answers, without labels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.training.distillation.distill import Distilled, Progress, distill_adapters
    from orthomerge.training.distillation.measure import Measured
    from orthomerge.training.distillation.settings import PROBLEMS, DistillSettings
    from orthomerge.training.distillation.teachers import form_of_adapters

__all__ = [
    "PROBLEMS",
    "DistillSettings",
    "Distilled",
    "Measured",
    "Progress",
    "distill_adapters",
    "form_of_adapters",
]

# Imported when first used: the Trainer takes seconds to import.
_HOMES = {
    "PROBLEMS": "settings",
    "DistillSettings": "settings",
    "Distilled": "distill",
    "Measured": "measure",
    "Progress": "distill",
    "distill_adapters": "distill",
    "form_of_adapters": "teachers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orthomerge.training.distillation' has no '{name}'")
    return getattr(import_module(f"orthomerge.training.distillation.{_HOMES[name]}"), name)
