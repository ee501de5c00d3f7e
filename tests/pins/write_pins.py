"""Write the pins anew: only after a change of keys or records that is meant, and listed.

`python tests/pins/write_pins.py`; what changed is then in `git diff tests/pins`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from recipe_keys import digest, keys_by_arm
from tiny_merges import MERGES, merged

from orthomerge.experiment import load_recipe, packaged_recipes
from orthomerge.models.assets import resolve_model
from orthomerge.tasks import get_task

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
KEPT = ("demo", "offline8", "which-method", "convert")


def main() -> None:
    """Both files of pins."""
    keys = {
        name: {
            arm: {kind: digest(names) for kind, names in kinds.items() if names}
            for arm, kinds in keys_by_arm(f"recipes/{name}").items()
        }
        for name in packaged_recipes()
    }
    inputs = {}
    for name in KEPT:
        recipe, _ = load_recipe(RESULTS / name / "recipe.yaml")
        found = {task.name: recipe.data.of(task) for task in map(get_task, recipe.tasks)}
        data = {task: rows.fingerprint for task, rows in found.items()}
        inputs[name] = {"base": resolve_model(recipe.base).sha256, "data": data}
    _write("keys.json", {"inputs of kept results": inputs, "keys by arm": keys})
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        records = {name: merged(Path(folder), name) for name in MERGES}
    merges = {n: {"merge.json": json.loads(text), "rows": r} for n, (text, r) in records.items()}
    _write("merges.json", merges)


def _write(name: str, content: object) -> None:
    (HERE / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
