"""A recipe from a file, a name, or plain values; what is wrong with it in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orthomerge.errors import RecipeError, unknown_name
from orthomerge.experiment.arms import Arm, Merge
from orthomerge.experiment.distill import Begin, Distill
from orthomerge.experiment.parts import (
    AdapterShape,
    Data,
    Known,
    Part,
    Resources,
    StatisticsPart,
    TaskTraining,
    TextPart,
    Training,
)
from orthomerge.experiment.recipe import MERGE, Recipe
from orthomerge.io.documents import (
    YAML_BYTES,
    Unreadable,
    is_array,
    is_object,
    parse_yaml,
    read_text,
)
from orthomerge.io.rows import DISTILL
from orthomerge.recipes import packaged_recipes


def load_recipe(source: str | Path, changes: Mapping[str, Any] | None = None) -> tuple[Recipe, str]:
    """A recipe and its text, from a path or the name of one that comes with the package.

    `changes` override its values by dotted key (`data.train`, `merges.0.weights`); the text then
    says so and holds the values as changed.

    Raises:
        RecipeError: no such file, not YAML, a key that does not exist (the message names the
            nearest), a value that does not fit, or a change at a place that is not there.
        UnknownNameError: a task, method, solver or start that does not exist.
    """
    text = _text(source)
    try:
        values = parse_yaml(text)
    except Unreadable as problem:
        raise RecipeError(f"recipe '{source}' cannot be read as YAML: {problem}.") from problem
    if not is_object(values):
        raise RecipeError(f"recipe '{source}' is not a mapping of keys: see recipes/demo.yaml.")
    for key, value in (changes or {}).items():
        _change(values, key, value)
    if changes:
        said = ", ".join(f"{key}={value}" for key, value in changes.items())
        text = f"# {source} with {said}\n" + yaml.safe_dump(values, sort_keys=False)
    return parse_recipe(values, where=f"recipe '{source}'"), text


def _text(source: str | Path) -> str:
    path = Path(source)
    try:
        if path.is_file():
            return read_text(path, YAML_BYTES)
    except (Unreadable, OSError) as problem:
        raise RecipeError(f"recipe '{source}' cannot be read: {problem}.") from problem
    packaged = packaged_recipes()
    name = path.as_posix().removeprefix("recipes/")
    name = name if name.endswith(".yaml") else f"{name}.yaml"
    if name not in packaged:
        raise RecipeError(
            f"no recipe '{source}': no such file; recipes that come along: {', '.join(packaged)}."
        )
    return packaged[name].read_text(encoding="utf-8")


def _change(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted key; what the value is worth is for the validation to say."""
    place: Any = values
    names = key.split(".")
    for depth, name in enumerate(names):
        where: Any = name
        if is_array(place) and name.isdigit() and int(name) < len(place):
            where = int(name)
        elif not is_object(place):
            above = ".".join(names[:depth])
            raise RecipeError(f"'{key}' names no place in the recipe: '{above}' has no '{name}'.")
        if depth == len(names) - 1:
            place[where] = value
        else:
            place = place.setdefault(where, {}) if is_object(place) else place[where]


def parse_recipe(values: dict[str, Any], *, where: str = "the recipe") -> Recipe:
    """A recipe from plain values; see `load_recipe` for what it raises."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as problem:
        raise _plain(problem, where) from problem


def _plain(problem: ValidationError, where: str) -> RecipeError:
    """The first of pydantic's findings as one sentence."""
    first = problem.errors(include_url=False)[0]
    place = _said(first["loc"])
    if first["type"] == "extra_forbidden":
        parent = first["loc"][:-1]
        error = unknown_name("key", str(first["loc"][-1]), _fields(parent), error=RecipeError)
        inside = f" under '{_said(parent)}'" if parent else ""
        return RecipeError(f"{where}{inside}: {error}")
    if first["type"] == "missing":
        return RecipeError(f"{where} has no '{place}', which it needs.")
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"{where}: '{place}' is {first['input']!r}: {message}.")


def _said(location: tuple[int | str, ...]) -> str:
    """A place in a recipe as its keys; of a merge's kind pydantic speaks, the recipe does not."""
    tagged = len(location) > 2 and location[0] == "merges" and location[2] in (MERGE, DISTILL)
    return ".".join(map(str, (*location[:2], *location[3:]) if tagged else location))


def _fields(location: tuple[int | str, ...]) -> list[str]:
    parts: dict[str, type[Part]] = {
        "data": Data,
        "adapter": AdapterShape,
        "statistics": StatisticsPart,
        "text": TextPart,
        "training": TaskTraining if len(location) > 1 else Training,
        "arms": Arm,
        "merges": Merge,
        "known": Known,
        "resources": Resources,
    }
    model = parts.get(str(location[0]), Recipe) if location else Recipe
    if model is Merge and location[2:3] == (DISTILL,):
        model = Begin if "from" in location else Distill
    return [field.alias or name for name, field in model.model_fields.items()]
