"""Recipes and runs: a recipe is a graph of steps, named by content, done anywhere, resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.experiment.preview import DryRun, dry_run
    from orthomerge.experiment.recipe import Recipe
    from orthomerge.experiment.recipe_file import load_recipe, parse_recipe
    from orthomerge.experiment.run import Run
    from orthomerge.recipes import packaged_recipes

__all__ = [
    "DryRun",
    "Recipe",
    "Run",
    "dry_run",
    "load_recipe",
    "packaged_recipes",
    "parse_recipe",
]

__getattr__ = first_use(__name__)
