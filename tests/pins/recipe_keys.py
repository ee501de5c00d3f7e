"""The keys of everything that a recipe makes, without its base model and without its data."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orthomerge.experiment import load_recipe
from orthomerge.experiment.graph import Graph
from orthomerge.experiment.keys import Keys
from orthomerge.io.files import fingerprint
from orthomerge.models.assets import ResolvedModel
from orthomerge.tasks import TaskData

KINDS = ("stats", "start", "train", "fisher", "eval", "merge")


def graph_of(source: str | Path, base: str | None = None, data: dict[str, str] | None = None):
    """The graph of a recipe whose base and rows have the hashes given, else hashes of names."""
    recipe, _ = load_recipe(source)
    keys = Keys(recipe, Path("run"))
    keys.base = ResolvedModel("base", "path", None, base or fingerprint(recipe.base), "base")
    keys.data = {
        name: TaskData([], [], [], data[name] if data else fingerprint(name)) for name in keys.tasks
    }
    return Graph(keys)


def kept_keys(source: str | Path, base: str, data: dict[str, str], rows) -> list[str]:
    """The keys of the rows that a recipe asks for, where `rows` decide its choices."""
    asked = graph_of(source, base, data).evaluations(rows)
    return [key for each in asked for _, key in each.keys]


def keys_by_arm(source: str | Path) -> dict[str, dict[str, list[str]]]:
    """What each arm of a recipe asks for: row keys, names of artifacts by kind, merged folders."""
    graph = graph_of(source)
    keys = graph.keys
    found: dict[str, dict[str, list[str]]] = {}
    whole = graph.evaluations({}, assume=True)
    for arm in keys.recipe.arms:
        asked = [each for each in whole if each.arm == arm]
        jobs = list(graph.jobs(asked, {}, lambda path: False).values())
        found[arm] = {"rows": [key for each in asked for _, key in each.keys]}
        for kind in KINDS:
            found[arm][kind] = [job.id for job in jobs if job.kind == kind]
        found[arm]["merged"] = [
            str(keys.merged_path(arm, e.seed, e.rate, keys.recipe.merges[e.merge], e.weight))
            for e in asked
            if e.merge is not None and e.weight is not None
        ]
    return found


def digest(names: list[str]) -> str:
    """How many names there are, and a hash of them in their order."""
    return f"{len(names)} {hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:16]}"
