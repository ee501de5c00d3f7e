"""The command line: a file a verb; each parses, calls the library and prints."""

from orthomerge.cli import (
    convert,
    convert_format,
    diagnose,
    distill,
    evaluate,
    fisher,
    init,
    listing,
    merge,
    old,
    report,
    resize,
    run,
    stats,
    stats_files,
    train,
    tune,
    verify,
)
from orthomerge.cli._app import app, main

__all__ = [
    "app", "convert", "convert_format", "diagnose", "distill", "evaluate", "fisher", "init",
    "listing", "main", "merge", "old", "report", "resize", "run", "stats", "stats_files", "train",
    "tune", "verify",
]  # fmt: skip
