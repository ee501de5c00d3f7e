"""Trackers that people look at already: what the Trainer reports to, and where their files go."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from orthomerge.errors import RecipeError, unknown_name

TRACKERS = {
    "tensorboard": ("tensorboard", "TENSORBOARD_LOGGING_DIR"),
    "wandb": ("wandb", "WANDB_DIR"),
    "mlflow": ("mlflow", "MLFLOW_TRACKING_URI"),
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

    A variable that the user has set is left as it is. The block is a run of its own in every
    tracker, unless the caller has one open already.

    Raises:
        RecipeError: what `check_trackers` refuses.
    """
    found = check_trackers(names)
    set_here: list[str] = []
    for name in found:
        variable = TRACKERS[name][1]
        if variable not in os.environ:
            os.environ[variable] = _place(name, folder, run)
            set_here.append(variable)
    opened = "wandb" in found and _wandb().run is None
    try:
        yield found
    finally:
        if opened:  # the Trainer leaves it open, and the next training would go on in it
            _wandb().finish()
        for variable in set_here:
            del os.environ[variable]


def _place(name: str, folder: Path, run: str) -> str:
    """Where a tracker's files go, made if need be, as its variable says it."""
    place = folder / run if name == "tensorboard" else folder
    place.mkdir(parents=True, exist_ok=True)
    return _database(place) if name == "mlflow" else str(place)


def _database(place: Path) -> str:
    """MLflow's database, made by one process alone; plain folders it refuses by now."""
    address = f"sqlite:///{place.resolve() / 'mlflow.db'}"
    with FileLock(place / "mlflow.lock"):
        import_module("mlflow").MlflowClient(address).search_experiments()
    return address


def _wandb() -> Any:
    """Weights & Biases, imported only where it is asked for."""
    return import_module("wandb")
