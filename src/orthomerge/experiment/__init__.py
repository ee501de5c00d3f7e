"""Recipes and runs: a recipe is a graph of steps, named by content, done anywhere, resumable."""

from orthomerge.experiment.preview import DryRun, dry_run
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.recipe_file import load_recipe, packaged_recipes, parse_recipe
from orthomerge.experiment.run import Run

__all__ = [
    "DryRun",
    "Recipe",
    "Run",
    "dry_run",
    "load_recipe",
    "packaged_recipes",
    "parse_recipe",
]
