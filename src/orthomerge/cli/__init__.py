"""The command line: a file a verb; each parses, calls the library and prints."""

from orthomerge.cli import diagnose, init, merge, report, run, stats, train
from orthomerge.cli._app import app, main

__all__ = ["app", "diagnose", "init", "main", "merge", "report", "run", "stats", "train"]

# The help lists the verbs in the order in which a person meets them.
_ORDER = (
    "demo", "run", "report", "stats", "init", "train", "merge", "eval", "diagnose", "methods",
    "tasks",
)  # fmt: skip
app.registered_commands.sort(
    key=lambda command: _ORDER.index(command.name or getattr(command.callback, "__name__", ""))
)
