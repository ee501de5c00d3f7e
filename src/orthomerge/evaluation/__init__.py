"""Scores: of classifiers and regressions, of answers in words, by lm-evaluation-harness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.evaluation.classification import Evaluator, Update, score
    from orthomerge.evaluation.text import TextEvaluator

__all__ = ["Evaluator", "TextEvaluator", "Update", "score"]

__getattr__ = first_use(__name__)
