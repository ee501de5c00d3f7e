"""The command line: one file per verb, imported when it is called; `_help.VERBS` lists them."""

from orthomerge.cli._app import app, main

__all__ = ["app", "main"]
