"""Diagonal Fisher information of adapted layers on a task's rows, and the file that carries it."""

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
