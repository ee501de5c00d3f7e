"""Base models: found, fetched, loaded, and their layers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.models.assets import ResolvedModel, resolve_model
    from orthomerge.models.loading import (
        load_backbone,
        load_classifier,
        load_language_model,
        load_tokenizer,
    )

__all__ = [
    "ResolvedModel",
    "load_backbone",
    "load_classifier",
    "load_language_model",
    "load_tokenizer",
    "resolve_model",
]

__getattr__ = first_use(__name__)
