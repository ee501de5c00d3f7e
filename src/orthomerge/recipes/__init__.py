"""Recipes that come along; `orthomerge run demo.yaml` finds them by name."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable


def packaged_recipes() -> dict[str, Traversable]:
    """The recipes that come along, by name: those at the top first, then the folders'."""
    found = dict(_below(files(__name__), ""))
    return {name: found[name] for name in sorted(found, key=lambda n: (n.count("/"), n))}


def _below(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _below(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".yaml"):
            yield prefix + item.name, item
