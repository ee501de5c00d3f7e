"""The command line: a file a verb; each parses, calls the library and prints."""

from orthomerge.cli import (
    board,
    card,
    convert,
    diagnose,
    distill,
    evaluate,
    fisher,
    init,
    listing,
    merge,
    plan,
    report,
    run,
    stats,
    stats_files,
    train,
    tune,
    verify,
)
from orthomerge.cli._app import app, main

__all__ = [
    "app", "board", "card", "convert", "diagnose", "distill", "evaluate", "fisher", "init",
    "listing", "main", "merge", "plan", "report", "run", "stats", "stats_files", "train", "tune",
    "verify",
]  # fmt: skip
