"""Weights of a merge found on data: searched on validation rows, or by entropy; Fisher weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.tuning.adamerging import EntropySettings, minimise_entropy
    from orthomerge.tuning.fisher import adapter_fisher, fisher_on_texts, text_fisher
    from orthomerge.tuning.groups import depth_groups
    from orthomerge.tuning.inputs import Inputs, TuneTask, read_inputs
    from orthomerge.tuning.result import MERGED, WEIGHTS, Method, Trial, Tuned
    from orthomerge.tuning.search import SearchSettings, search_weights
    from orthomerge.tuning.study import require_optuna

__all__ = [
    "MERGED",
    "WEIGHTS",
    "EntropySettings",
    "Inputs",
    "Method",
    "SearchSettings",
    "Trial",
    "TuneTask",
    "Tuned",
    "adapter_fisher",
    "depth_groups",
    "fisher_on_texts",
    "minimise_entropy",
    "read_inputs",
    "require_optuna",
    "search_weights",
    "text_fisher",
]

__getattr__ = first_use(__name__)
