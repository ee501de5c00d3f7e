"""Recipes and runs: validated, content-addressed, resumable."""

from orthomerge.experiment.dry import DryRun, dry_run
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
