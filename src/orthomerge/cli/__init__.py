"""The command line: a file a verb; each parses, calls the library and prints."""

from orthomerge.cli import (
    convert,
    diagnose,
    fisher,
    init,
    merge,
    report,
    run,
    stats,
    stats_files,
    train,
    tune,
)
from orthomerge.cli._app import app, main

__all__ = [
    "app", "convert", "diagnose", "fisher", "init", "main", "merge", "report", "run", "stats",
    "stats_files", "train", "tune",
]  # fmt: skip
