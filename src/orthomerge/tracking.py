"""Trackers that people look at already: what the Trainer reports to, and where their files go."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from orthomerge.errors import RecipeError, unknown_name

TRACKERS = {
    "tensorboard": ("tensorboard", "TENSORBOARD_LOGGING_DIR"),
    "wandb": ("wandb", "WANDB_DIR"),
    "mlflow": ("mlflow", None),
}
"""Each tracker with the package it needs and the variable that says where its files go."""


def check_trackers(names: Sequence[str]) -> list[str]:
    """The names, each once.

    Raises:
        RecipeError: a tracker that does not exist, or whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS, error=RecipeError)
        package = TRACKERS[name][0]
        if find_spec(package) is None:
            raise RecipeError(f"report_to '{name}' needs a package: pip install {package}.")
    return list(dict.fromkeys(names))


@contextmanager
def following(names: Sequence[str], folder: Path, run: str) -> Generator[list[str], None, None]:
    """The trackers' names for the Trainer, their files sent below `folder` while the block runs.

    A variable that the user has set is left as it is. MLflow writes to its own tracking URI.

    Raises:
        RecipeError: what `check_trackers` refuses.
    """
    found = check_trackers(names)
    set_here: list[str] = []
    for name in found:
        variable = TRACKERS[name][1]
        if variable and variable not in os.environ:
            place = folder / run if name == "tensorboard" else folder
            place.mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(place)
            set_here.append(variable)
    try:
        yield found
    finally:
        for variable in set_here:
            del os.environ[variable]
