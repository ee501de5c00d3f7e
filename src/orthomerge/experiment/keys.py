"""What a recipe's results depend on: the hashes, and the paths that follow from them.

A hash is taken of inputs, never of outputs, so that a row or a piece can be told to be there. What
came later (words, say) counts only where it is used: kept results keep their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthomerge.adapters import FROZEN_B
from orthomerge.experiment.arms import Merge
from orthomerge.experiment.inputs import Inputs
from orthomerge.experiment.recipe import Recipe
from orthomerge.fisher import SUFFIX as FISHER_SUFFIX
from orthomerge.io.files import fingerprint, slug
from orthomerge.merging import get_method
from orthomerge.statistics import SUFFIX

# Raised when a piece would come out differently from the same inputs.
PIECES = 1
# How the statistics that merging methods ask for are collected.
MERGE_GRANULARITY = "token"


class Keys(Inputs):
    """The hashes of one recipe, and where its pieces lie in one output folder."""

    def __init__(self, recipe: Recipe, output: Path) -> None:
        super().__init__(recipe)
        self.output = output
        self._adapters: dict[tuple[str, str, int, float], str] = {}

    # Hashes -------------------------------------------------------------------------------------

    def stats_key(
        self,
        task: str,
        granularity: str,
        samples: int | None = None,
        targets: Sequence[str] | None = None,
    ) -> str:
        """Hash of all that a task's statistics depend on."""
        part = self.recipe.statistics.model_dump() | ({"samples": samples} if samples else {})
        return fingerprint(
            {
                "piece": ["statistics", PIECES],
                "base": self.base.sha256,
                "data": self.data[task].fingerprint,
                "statistics": part,
                "max_length": self.recipe.data.max_length,
                "targets": sorted(targets or self.recipe.adapter.targets),
                "granularity": granularity,
            }
            | self._words(task)
        )

    def start_key(self, name: str, task: str, seed: int) -> str:
        """Hash of all that a task's start in the arm called `name` depends on."""
        arm = self.recipe.arms[name]
        depends: dict[str, Any] = {
            "piece": ["start", PIECES],
            "base": self.base.sha256,
            "adapter": self.recipe.adapter_of(name).model_dump(),
            "start": arm.start,
            "options": arm.options,
            "seed": seed if arm.seed_policy == "shared" else [seed, task],
        }
        if self.in_words:
            depends["form"] = "text"
        else:
            depends["head"] = [seed, task, *self.head(task)]
        if arm.solver:
            about = (arm.granularity, arm.samples, arm.targets)
            depends["others"] = [
                self.stats_key(t, *about) for t in self.tasks_of(name) if t != task
            ]
            depends["own"] = self.stats_key(task, *about)
        if arm.constraint == "project":
            depends["kept out"] = arm.room if arm.room else arm.share
        if arm.constraint == FROZEN_B:
            depends["held"] = "B"
        if arm.quiet:
            depends["quiet"] = arm.quiet
        return fingerprint(depends)

    def adapter_key(self, name: str, task: str, seed: int, rate: float) -> str:
        """Hash of all that a trained adapter of the arm called `name` depends on."""
        asked = (name, task, seed, rate)
        if asked not in self._adapters and self.recipe.arms[name].convert:
            self._adapters[asked] = self._converted_key(name, task, seed, rate)
        if asked not in self._adapters:
            arm = self.recipe.arms[name]
            training, rate_of = self.settings(task)
            charged = self._charged(name, task, seed) if arm.constraint == "penalty" else {}
            self._adapters[asked] = fingerprint(
                {
                    "piece": ["adapter", PIECES],
                    "start": self.start_key(name, task, seed),
                    "data": self.data[task].fingerprint,
                    "max_length": self.recipe.data.max_length,
                    "training": training,
                    "learning_rate": rate_of(rate),
                    "constraint": arm.constraint,
                    "seed": [seed, task],
                }
                | charged
                | self._words(task)
            )
        return self._adapters[asked]

    def _charged(self, name: str, task: str, seed: int) -> dict[str, Any]:
        """What the constraint "penalty" adds to what an adapter depends on."""
        arm = self.recipe.arms[name]
        about = (arm.granularity, arm.samples, arm.targets)
        found: dict[str, Any] = {
            "strength": arm.strength,
            "others": [self.stats_key(t, *about) for t in self.tasks_of(name) if t != task],
        }
        if arm.isotropic_share:
            found["isotropic_share"] = arm.isotropic_share
        if arm.penalty_moment != "others":
            found["moment"] = arm.penalty_moment
        if arm.penalty_moment == "pooled":
            found["own"] = self.stats_key(task, *about)
        if arm.penalty_moment == "random":
            found["drawn"] = seed if arm.seed_policy == "shared" else [seed, task]
        return {"penalty": found}

    def _converted_key(self, name: str, task: str, seed: int, rate: float) -> str:
        """Hash of all that a converted adapter depends on: the one it was, and how."""
        arm = self.recipe.arms[name]
        how = arm.convert
        assert how is not None
        about = (arm.granularity, arm.samples, arm.targets)
        training, rate_of = self.settings(task)
        return fingerprint(
            {
                "piece": ["converted", PIECES],
                "adapter": self.adapter_key(how.source, task, seed, rate),
                "convert": how.model_dump(exclude={"source", "recover", "learning_rate"}),
                "others": [self.stats_key(t, *about) for t in self.tasks_of(name) if t != task],
                "own": self.stats_key(task, *about),
                "recover": how.recover
                and [how.recover, how.learning_rate or rate_of(rate), training],
                "seed": [seed, task],
            }
        )

    def row_key(
        self,
        name: str,
        task: str,
        split: str,
        adapters: Sequence[str],
        merge: Merge | None,
        weight: float,
    ) -> str:
        """Hash of all that one evaluation of the arm called `name` depends on."""
        depends: dict[str, Any] = {
            "piece": ["row", PIECES],
            "task": task,
            "split": split,
            "data": self.data[task].fingerprint,
            "adapters": list(adapters),
        } | self._words(task, self.scoring_of(task))
        if merge is not None:
            depends["merge"] = [merge.method, weight, merge.options, merge.rank]
            if merge.seed is not None:
                depends["merge"].append({"seed": merge.seed})
            needs = get_method(merge.method).needs
            if "moments" in needs:
                targets = self.recipe.arms[name].targets
                depends["statistics"] = [
                    self.stats_key(t, MERGE_GRANULARITY, targets=targets)
                    for t in self.tasks_of(name)
                ]
            if "fisher" in needs:
                depends["fisher"] = self.recipe.statistics.model_dump()
        return fingerprint(depends)

    def _words(self, task: str, *more: str | None) -> dict[str, Any]:
        """What a task in words adds to what a piece depends on: nothing for a classifier."""
        prompt = self.prompts.get(task)
        return {"words": [prompt.fingerprint, *more]} if prompt else {}

    # Paths --------------------------------------------------------------------------------------

    def stats_path(
        self,
        task: str,
        granularity: str,
        samples: int | None = None,
        targets: Sequence[str] | None = None,
    ) -> Path:
        """The file of a task's statistics."""
        key = self.stats_key(task, granularity, samples, targets)
        return self.output / "stats" / f"{slug(task)}-{granularity}-{key[:12]}{SUFFIX}"

    def stats_paths(self, name: str) -> dict[str, Path]:
        """The file of every task's statistics that an arm's starts look at."""
        arm = self.recipe.arms[name]
        about = (arm.granularity, arm.samples, arm.targets)
        return {task: self.stats_path(task, *about) for task in self.tasks_of(name)}

    def start_path(self, name: str, task: str, seed: int) -> Path:
        """The folder of a task's start; arms that start alike share it."""
        arm = self.recipe.arms[name]
        return self._piece("starts", arm.start, task, seed, self.start_key(name, task, seed))

    def adapter_path(self, name: str, task: str, seed: int, rate: float) -> Path:
        """The folder of a task's trained adapter."""
        return self._piece("adapters", name, task, seed, self.adapter_key(name, task, seed, rate))

    def fisher_path(self, name: str, task: str, seed: int, rate: float) -> Path:
        """The file of the Fisher information of a task's trained adapter."""
        key = fingerprint(
            {
                "piece": ["fisher", PIECES],
                "adapter": self.adapter_key(name, task, seed, rate),
                "statistics": self.recipe.statistics.model_dump(),
            }
        )
        folder = self._piece("fisher", name, task, seed, key)
        return folder.with_name(folder.name + FISHER_SUFFIX)

    def merged_path(self, name: str, seed: int, rate: float, merge: Merge, weight: float) -> Path:
        """The folder of a merged adapter, where the recipe keeps them."""
        adapters = [self.adapter_key(name, t, seed, rate) for t in self.tasks_of(name)]
        later = {"seed"} if merge.seed is None else set[str]()
        what = merge.model_dump(exclude={"weights", "choose_from", *later})
        key = fingerprint([adapters, what, weight, PIECES])
        folder = f"{merge.method}-w{weight:g}-{key[:12]}"
        return self.output / "merged" / name / f"seed{seed}" / folder

    def _piece(self, kind: str, group: str, task: str, seed: int, key: str) -> Path:
        folder = f"{slug(task)}-{key[:12]}"
        return self.output / kind / group / f"seed{seed}" / folder
