"""The command line: a file a verb; each parses, calls the library and prints."""

from orthomerge.cli import diagnose, init, merge, report, run, stats, stats_files, train
from orthomerge.cli._app import app, main

__all__ = [
    "app", "diagnose", "init", "main", "merge", "report", "run", "stats", "stats_files", "train",
]  # fmt: skip
