"""The pieces of a run: statistics, starts, adapters, Fisher information, each made once.

Every piece lies in a folder or file named after the hash of all it depends on. A piece that is
there is therefore the right one, and it is made only when something missing asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from orthomerge.adapters import (
    OsrmConfig,
    initialize_osrm_weights,
    kept_out_directions,
    new_lora,
    plan_ranks,
    read_adapter,
    save_start,
    unit_rows,
)
from orthomerge.assets import resolve_model
from orthomerge.errors import RecipeError, SubspaceError
from orthomerge.experiment.progress import Reporter, timed
from orthomerge.experiment.recipe import Arm, Merge, Recipe
from orthomerge.features import (
    SUFFIX,
    Statistics,
    batches,
    collect_statistics,
    sample_texts,
    target_layers,
)
from orthomerge.files import derive_seed, fingerprint, slug
from orthomerge.fisher import SUFFIX as FISHER_SUFFIX
from orthomerge.fisher import Fisher, load_fisher, save_fisher
from orthomerge.merging import get_method
from orthomerge.models import load_classifier, load_tokenizer, load_trunk, tokenizer_hash
from orthomerge.tasks import Task, TaskData, get_task
from orthomerge.training import TrainingSettings, train_adapter
from orthomerge.tuning import fisher_on_texts

# Raised when a piece would come out differently from the same inputs.
PIECES = 1
# How the statistics that merging methods ask for are collected.
MERGE_GRANULARITY = "token"


class Pieces:
    """The pieces of one recipe in one output folder.

    `trained` is told the key of every adapter that a training was finished for.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        reporter: Reporter,
        seconds: dict[str, float],
        trained: Callable[[str], None],
    ) -> None:
        self.recipe, self.output = recipe, output
        self.tasks = _distinct([get_task(name) for name in recipe.tasks])
        self._reporter, self._seconds, self._trained = reporter, seconds, trained
        self._stats: dict[str, Statistics] = {}

    # What everything depends on -----------------------------------------------------------------

    @cached_property
    def base(self):
        """The base model, found on disk, in a package or on the hub."""
        return resolve_model(self.recipe.base)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.base.path_or_id)

    @cached_property
    def data(self) -> dict[str, TaskData]:
        """Each task's rows, as the recipe draws them."""
        d = self.recipe.data
        return {
            name: task.data(train=d.train, selection=d.selection, test=d.test, seed=d.seed)
            for name, task in self.tasks.items()
        }

    # Keys: hashes of inputs, never of outputs, so that rows can be told to be there -------------

    def stats_key(self, task: str, granularity: str, samples: int | None = None) -> str:
        """Hash of all that a task's statistics depend on."""
        part = self.recipe.statistics.model_dump() | ({"samples": samples} if samples else {})
        return fingerprint(
            {
                "piece": ["statistics", PIECES],
                "base": self.base.sha256,
                "data": self.data[task].fingerprint,
                "statistics": part,
                "max_length": self.recipe.data.max_length,
                "targets": sorted(self.recipe.adapter.targets),
                "granularity": granularity,
            }
        )

    def start_key(self, arm: Arm, task: str, seed: int) -> str:
        """Hash of all that a task's start depends on."""
        depends: dict[str, Any] = {
            "piece": ["start", PIECES],
            "base": self.base.sha256,
            "adapter": self.recipe.adapter.model_dump(),
            "start": arm.start,
            "options": arm.options,
            "seed": seed if arm.seed_policy == "shared" else [seed, task],
            "head": [seed, task, *self.head(task)],
        }
        if arm.solver:
            depends["others"] = [
                self.stats_key(t, arm.granularity, arm.samples) for t in self.tasks if t != task
            ]
            depends["own"] = self.stats_key(task, arm.granularity, arm.samples)
        if arm.constraint == "project":
            depends["kept out"] = arm.room if arm.room else arm.share
        if arm.quiet:
            depends["quiet"] = arm.quiet
        return fingerprint(depends)

    def adapter_key(self, arm: Arm, task: str, seed: int, rate: float) -> str:
        """Hash of all that a trained adapter depends on."""
        training = self.recipe.training.model_dump(exclude={"learning_rate", "rate_tolerance"})
        return fingerprint(
            {
                "piece": ["adapter", PIECES],
                "start": self.start_key(arm, task, seed),
                "data": self.data[task].fingerprint,
                "max_length": self.recipe.data.max_length,
                "training": training,
                "learning_rate": rate,
                "constraint": arm.constraint,
                "seed": [seed, task],
            }
        )

    def row_key(
        self, task: str, split: str, adapters: Sequence[str], merge: Merge | None, weight: float
    ) -> str:
        """Hash of all that one evaluation depends on."""
        depends: dict[str, Any] = {
            "piece": ["row", PIECES],
            "task": task,
            "split": split,
            "data": self.data[task].fingerprint,
            "adapters": list(adapters),
        }
        if merge is not None:
            depends["merge"] = [merge.method, weight, merge.options, merge.rank]
            needs = get_method(merge.method).needs
            if "moments" in needs:
                depends["statistics"] = [self.stats_key(t, MERGE_GRANULARITY) for t in self.tasks]
            if "fisher" in needs:
                depends["fisher"] = self.recipe.statistics.model_dump()
        return fingerprint(depends)

    def check(self) -> None:
        """Refuse, before anything is made, what could not be made.

        Raises:
            AssetError: the base model or a task's data cannot be found.
            UnknownNameError: a target matches no layer.
            TaskError: a task with one label or too few rows.
            SubspaceError: a rank larger than a layer.
        """
        layers = target_layers(self.trunk, self.recipe.adapter.targets)
        rank = self.recipe.adapter.rank
        for name, layer in layers.items():
            weight = layer.weight
            assert isinstance(weight, torch.Tensor)
            if rank > min(weight.shape):
                raise SubspaceError(
                    f"rank {rank} is larger than layer '{name}' {list(weight.shape)}: choose a "
                    f"rank up to {min(weight.shape)}."
                )
        _ = self.data  # drawing the rows refuses tasks that cannot be trained on

    # Pieces, each made only when something missing asks for it ----------------------------------

    def statistics(self, task: str, granularity: str, samples: int | None = None) -> Statistics:
        """A task's statistics, from its file or collected now."""
        key = self.stats_key(task, granularity, samples)
        if key in self._stats:
            return self._stats[key]
        path = self.output / "stats" / f"{slug(task)}-{granularity}-{key[:12]}{SUFFIX}"
        if not path.is_file():
            part = self.recipe.statistics
            self._reporter.stage(f"statistics of {task} ({granularity})")
            with timed(self._seconds, "stats"):
                texts = [(r.text, r.pair) for r in self.data[task].train]
                seed = derive_seed(part.seed, task)
                sample = sample_texts(texts, samples or part.samples, seed)
                done = 0

                def count(size: int) -> None:
                    nonlocal done
                    done += size
                    self._reporter.step(done, len(sample))

                collect_statistics(
                    self.trunk,
                    batches(sample, self.tokenizer, max_length=self.recipe.data.max_length),
                    self.recipe.adapter.targets,
                    granularity=granularity,
                    task=task,
                    model_id=self.base.name,
                    model_sha256=self.base.sha256,
                    tokenizer_hash=tokenizer_hash(self.tokenizer),
                    progress=count,
                ).save(path)
        self._stats[key] = Statistics.load(path)
        return self._stats[key]

    @cached_property
    def trunk(self) -> Any:
        """The base model without a head."""
        return load_trunk(self.base.path_or_id)

    def start(self, name: str, task: str, seed: int) -> Path:
        """A task's start folder."""
        arm = self.recipe.arms[name]
        key = self.start_key(arm, task, seed)
        path = self._piece("starts", arm.start, task, seed, key)
        if path.is_dir():
            return path
        shape = self.recipe.adapter
        draw = derive_seed(seed) if arm.seed_policy == "shared" else derive_seed(seed, task)
        others, own, config = self._problem(arm, task, draw)
        ranks = plan_ranks(others, shape.rank, arm.quiet)[0] if arm.quiet else None
        self._reporter.stage(f"start {name} of {task}")
        with timed(self._seconds, "init"):
            model = new_lora(
                self._classifier(task, seed),
                targets=shape.targets,
                rank=shape.rank,
                alpha=shape.alpha,
                dropout=shape.dropout,
                rslora=shape.rslora,
                task_type="SEQ_CLS",
                seed=draw,
                ranks=ranks,
            )
            kept_out = None
            if arm.start == "default_unit":
                unit_rows(model)
            elif config is not None:
                initialize_osrm_weights(model, others, own, config)
                if arm.constraint == "project":
                    kept_out = kept_out_directions(model, others, own, config)
            save_start(model, path, kept_out)
        return path

    def _problem(
        self, arm: Arm, task: str, seed: int
    ) -> tuple[list[Statistics], Statistics | None, OsrmConfig | None]:
        """Others' statistics, own ones and how to choose; nothing for PEFT's own starts."""
        if arm.solver is None:
            return [], None, None
        config = OsrmConfig(
            solver=arm.solver,
            granularity=arm.granularity,
            constraint=arm.constraint,
            share=arm.share,
            room=arm.room,
            seed=seed,
            options=arm.options,
        )
        found = {t: self.statistics(t, arm.granularity, arm.samples) for t in self.tasks}
        return [s for t, s in found.items() if t != task], found[task], config

    def _classifier(self, task: str, seed: int) -> Any:
        """The base with the task's fresh head, the same for every arm of one seed."""
        labels, regression = self.head(task)
        return load_classifier(
            self.base.path_or_id,
            num_labels=labels,
            regression=regression,
            seed=derive_seed(seed, task, "head"),
            name=self.base.name,
        )

    def head(self, task: str) -> tuple[int, bool]:
        """The number of outputs of a task's head, and whether it is a regression."""
        regression = self.tasks[task].kind == "regression"
        return (1 if regression else len(self.tasks[task].labels)), regression

    def adapter(self, name: str, task: str, seed: int, rate: float) -> Path:
        """A task's trained adapter folder."""
        arm = self.recipe.arms[name]
        key = self.adapter_key(arm, task, seed, rate)
        path = self._piece("adapters", name, task, seed, key)
        if path.is_dir():
            return path
        start = self.start(name, task, seed)
        part = self.recipe.training
        self._reporter.stage(f"train {name} · {task} · seed {seed} · {rate:g}")
        with timed(self._seconds, "train"):
            train_adapter(
                self._classifier(task, seed),
                start,
                self.data[task].train,
                self.tokenizer,
                regression=self.head(task)[1],
                settings=TrainingSettings(
                    epochs=part.epochs,
                    batch_size=part.batch_size,
                    learning_rate=rate,
                    weight_decay=part.weight_decay,
                    warmup=part.warmup,
                    max_length=self.recipe.data.max_length,
                ),
                constraint=arm.constraint,
                seed=derive_seed(seed, task, "training"),
                output=path,
                record={"arm": name, "task": task, "seed": seed, "rate": rate, "key": key},
                progress=self._reporter.step,
            )
        self._trained(key)
        return path

    def fisher(self, name: str, task: str, seed: int, rate: float) -> Fisher:
        """The Fisher information of a task's trained adapter, on the sample of its statistics."""
        arm, part = self.recipe.arms[name], self.recipe.statistics
        key = fingerprint(
            {
                "piece": ["fisher", PIECES],
                "adapter": self.adapter_key(arm, task, seed, rate),
                "statistics": part.model_dump(),
            }
        )
        folder = self._piece("fisher", name, task, seed, key)
        path = folder.with_name(folder.name + FISHER_SUFFIX)
        adapter = read_adapter(self.adapter(name, task, seed, rate))
        if not path.is_file():
            self._reporter.stage(f"Fisher information of {name} · {task} · seed {seed}")
            texts = [(r.text, r.pair) for r in self.data[task].train]
            sample = sample_texts(texts, part.samples, derive_seed(part.seed, task))
            with timed(self._seconds, "fisher"):
                found, meta = fisher_on_texts(
                    adapter,
                    self.tasks[task],
                    sample,
                    self.base,
                    self.tokenizer,
                    max_length=self.recipe.data.max_length,
                )
            save_fisher(path, found, meta)
        return load_fisher(path, adapter_sha256=adapter.sha256)

    def _piece(self, kind: str, group: str, task: str, seed: int, key: str) -> Path:
        folder = f"{slug(task)}-{key[:12]}"
        return self.output / kind / group / f"seed{seed}" / folder


def _distinct(tasks: Sequence[Task]) -> dict[str, Task]:
    """The tasks by name.

    Raises:
        RecipeError: two of one name, as two files of one name in different folders.
    """
    named = {task.name: task for task in tasks}
    if len(named) < len(tasks):
        names = [task.name for task in tasks]
        twice = next(n for n in names if names.count(n) > 1)
        raise RecipeError(f"two tasks are called '{twice}': rename one of the files.")
    return named
