"""Recipes and runs: validated, content-addressed, resumable."""

from orthomerge.experiment.recipe import Recipe, load_recipe, parse_recipe
from orthomerge.experiment.run import Run

__all__ = ["Recipe", "Run", "load_recipe", "parse_recipe"]
