"""Training: one task by the Transformers Trainer, from a start folder to an adapter folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

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

__getattr__ = first_use(__name__)
