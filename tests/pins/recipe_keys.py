"""The keys of everything that a recipe makes, without its base model and without its data."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orthomerge.experiment import load_recipe
from orthomerge.experiment.choices import asked, steps_behind
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.steps import KINDS, MergeStep
from orthomerge.io.files import fingerprint
from orthomerge.models.assets import ResolvedModel
from orthomerge.tasks import TaskData

# Conversions were counted as trainings when the tables were written.
_WRITTEN_AS = {"convert": "train"}


def experiment_of(source: str | Path, base: str | None = None, data: dict[str, str] | None = None):
    """The experiment of a recipe with the hashes of base and rows given, else hashes of names."""
    recipe, _ = load_recipe(source)
    exp = Experiment(recipe, "run")
    exp.base = ResolvedModel("base", "path", None, base or fingerprint(recipe.base), "base")
    exp.data = {
        name: TaskData([], [], [], data[name] if data else fingerprint(name)) for name in exp.tasks
    }
    return exp


def kept_keys(source: str | Path, base: str, data: dict[str, str], rows) -> list[str]:
    """The keys of the rows that a recipe asks for, where `rows` decide its choices."""
    exp = experiment_of(source, base, data)
    return [key for step in asked(exp, rows) for key in exp.row_keys(step).values()]


def keys_by_arm(source: str | Path) -> dict[str, dict[str, list[str]]]:
    """What each arm of a recipe asks for: row keys, names of artifacts by kind, merged folders."""
    exp = experiment_of(source)
    found: dict[str, dict[str, list[str]]] = {}
    whole = asked(exp, {}, assume=True)
    for arm in exp.recipe.arms:
        mine = [step for step in whole if step.arm == arm]
        steps = steps_behind(exp, mine, {}, lambda path: False)
        rows = [key for step in mine for key in exp.row_keys(step).values()]
        found[arm] = {"rows": rows} | {kind: [] for kind in KINDS if kind not in _WRITTEN_AS}
        for name, step in steps.items():
            found[arm][_WRITTEN_AS.get(step.kind, step.kind)].append(name)
        merges = [step for step in mine if isinstance(step, MergeStep)]
        found[arm]["merged"] = [str(step.folder(exp)) for step in merges]
    return found


def digest(names: list[str]) -> str:
    """How many names there are, and a hash of them in their order."""
    return f"{len(names)} {hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:16]}"
