"""Scores: of classifiers and regressions, of answers in words, by lm-evaluation-harness."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.evaluation.classification import Evaluator, Update, score
    from orthomerge.evaluation.text import TextEvaluator

__all__ = ["Evaluator", "TextEvaluator", "Update", "score"]


def __getattr__(name: str) -> Any:  # imported when first used: scikit-learn takes a second
    if name not in __all__:
        raise AttributeError(f"module 'orthomerge.evaluation' has no attribute '{name}'")
    home = "text" if name == "TextEvaluator" else "classification"
    return getattr(import_module(f"orthomerge.evaluation.{home}"), name)
