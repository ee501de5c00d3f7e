"""Diagonal Fisher information of adapted layers on a task's rows, and the file that carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.fisher.collect import collect_fisher
    from orthomerge.fisher.file import ENTRY, SUFFIX, Fisher, FisherMeta, load_fisher, save_fisher

__all__ = [
    "ENTRY",
    "SUFFIX",
    "Fisher",
    "FisherMeta",
    "collect_fisher",
    "load_fisher",
    "save_fisher",
]

__getattr__ = first_use(__name__)
