"""Recipes that come along; `orthomerge run demo.yaml` finds them by name."""
