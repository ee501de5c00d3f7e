"""Distillation: merged factors trained to give each adapter's own answers, without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

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

__getattr__ = first_use(__name__)
