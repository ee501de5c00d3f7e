"""Base models: found, fetched, loaded, and their layers by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_FINDING = ("ResolvedModel", "resolve_model")


def __getattr__(name: str) -> Any:  # imported when first used: Transformers takes seconds
    if name not in __all__:
        raise AttributeError(f"module 'orthomerge.models' has no attribute '{name}'")
    home = "assets" if name in _FINDING else "loading"
    return getattr(import_module(f"orthomerge.models.{home}"), name)
