"""The command line: a file a verb; each parses, calls the library and prints."""

from orthomerge.cli import (
    board,
    card,
    convert,
    diagnose,
    evaluate,
    fisher,
    init,
    merge,
    methods,
    plan,
    report,
    run,
    stats,
    stats_files,
    tasks,
    train,
    tune,
    verify,
)
from orthomerge.cli._app import app, main

__all__ = [
    "app", "board", "card", "convert", "diagnose", "evaluate", "fisher", "init", "main", "merge",
    "methods", "plan", "report", "run", "stats", "stats_files", "tasks", "train", "tune", "verify",
]  # fmt: skip
