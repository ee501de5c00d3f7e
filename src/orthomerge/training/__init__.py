"""Training: one task by the Transformers Trainer, from a start folder to an adapter folder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.training.adapter import Charged, train_adapter
    from orthomerge.training.distillation import DistillSettings, distill_adapters
    from orthomerge.training.recover import recover_adapter
    from orthomerge.training.settings import Precision, TrainingSettings

__all__ = [
    "Charged",
    "DistillSettings",
    "Precision",
    "TrainingSettings",
    "distill_adapters",
    "recover_adapter",
    "train_adapter",
]

# Imported when first used: the Trainer takes seconds to import, and its trackers need none of it.
_HOMES = {
    "Charged": "adapter",
    "DistillSettings": "distillation",
    "Precision": "settings",
    "TrainingSettings": "settings",
    "distill_adapters": "distillation",
    "recover_adapter": "recover",
    "train_adapter": "adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orthomerge.training' has no attribute '{name}'")
    return getattr(import_module(f"orthomerge.training.{_HOMES[name]}"), name)
