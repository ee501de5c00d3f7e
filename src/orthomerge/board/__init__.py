"""A small local page over a folder of runs: what they have reached, their reports, comparisons."""

from orthomerge.board.app import make_app, serve

__all__ = ["make_app", "serve"]
