"""A recipe carried out: rows are asked for, and only the pieces a missing row needs are made.

Every piece (statistics, start, adapter) lies in a folder named after the hash of all it depends
on, and every row carries such a hash. A piece or row that is there is therefore the right one, and
a run that was stopped, or whose rows alone were kept, goes on with what is missing.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from orthomerge.adapters import (
    Adapter,
    OsrmConfig,
    initialize_osrm_weights,
    kept_out_directions,
    new_lora,
    plan_ranks,
    read_adapter,
    save_merged,
    save_start,
    unit_rows,
)
from orthomerge.assets import resolve_model
from orthomerge.errors import OrthomergeError, RecipeError, SubspaceError
from orthomerge.evaluation import Evaluator, Update, score
from orthomerge.experiment.progress import Reporter, Silent, timed
from orthomerge.experiment.recipe import Arm, Merge, Recipe
from orthomerge.features import (
    SUFFIX,
    Statistics,
    batches,
    collect_statistics,
    sample_texts,
    target_layers,
)
from orthomerge.files import derive_seed, fingerprint, slug, write_json, write_text
from orthomerge.merging import merge_layers
from orthomerge.models import load_classifier, load_tokenizer, load_trunk, tokenizer_hash
from orthomerge.rows import SINGLE, ResultRow, append_rows, read_rows
from orthomerge.tasks import Row, Task, TaskData, get_task, majority
from orthomerge.training import TrainingSettings, train_adapter

ROWS, RUN, RECIPE = "results.jsonl", "run.json", "recipe.yaml"
OTHER_ROWS = "results-of-other-recipes.jsonl"
# Raised when a piece would come out differently from the same inputs.
PIECES = 1
# How many evaluations one training takes about as long as; only the progress bar rests on it.
TRAINING_UNITS = 6


class Run:
    """One recipe in one output folder."""

    def __init__(
        self,
        recipe: Recipe,
        output: str | Path,
        *,
        text: str = "",
        command: str = "",
        reporter: Reporter | None = None,
    ) -> None:
        self.recipe = recipe
        self.output = Path(output)
        self.reporter = reporter or Silent()
        self.seconds: dict[str, float] = {}
        self._text = text
        self._command = command
        self._tasks = _distinct([get_task(name) for name in recipe.tasks])
        self._rows: dict[str, ResultRow] = {}
        self._wanted: set[str] = set()
        self._counted: set[str] = set()
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
            for name, task in self._tasks.items()
        }

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores updates on the base model."""
        return Evaluator(
            self.base.path_or_id, self.tokenizer, max_length=self.recipe.data.max_length
        )

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
            "head": [seed, task, *self._head(task)],
        }
        if arm.solver:
            depends["others"] = [
                self.stats_key(t, arm.granularity, arm.samples) for t in self._tasks if t != task
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
        return fingerprint(depends)

    # Pieces, each made only when something missing asks for it ----------------------------------

    def statistics(self, task: str, granularity: str, samples: int | None = None) -> Statistics:
        """A task's statistics, from its file or collected now."""
        key = self.stats_key(task, granularity, samples)
        if key in self._stats:
            return self._stats[key]
        path = self.output / "stats" / f"{slug(task)}-{granularity}-{key[:12]}{SUFFIX}"
        if not path.is_file():
            part = self.recipe.statistics
            self.reporter.stage(f"statistics of {task} ({granularity})")
            with timed(self.seconds, "stats"):
                texts = [(r.text, r.pair) for r in self.data[task].train]
                seed = derive_seed(part.seed, task)
                sample = sample_texts(texts, samples or part.samples, seed)
                done = 0

                def count(size: int) -> None:
                    nonlocal done
                    done += size
                    self.reporter.step(done, len(sample))

                collect_statistics(
                    self._trunk,
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
    def _trunk(self) -> Any:
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
        self.reporter.stage(f"start {name} of {task}")
        with timed(self.seconds, "init"):
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
        found = {t: self.statistics(t, arm.granularity, arm.samples) for t in self._tasks}
        return [s for t, s in found.items() if t != task], found[task], config

    def _classifier(self, task: str, seed: int) -> Any:
        """The base with the task's fresh head, the same for every arm of one seed."""
        labels, regression = self._head(task)
        return load_classifier(
            self.base.path_or_id,
            num_labels=labels,
            regression=regression,
            seed=derive_seed(seed, task, "head"),
            name=self.base.name,
        )

    def _head(self, task: str) -> tuple[int, bool]:
        regression = self._tasks[task].kind == "regression"
        return (1 if regression else len(self._tasks[task].labels)), regression

    def adapter(self, name: str, task: str, seed: int, rate: float) -> Path:
        """A task's trained adapter folder."""
        arm = self.recipe.arms[name]
        key = self.adapter_key(arm, task, seed, rate)
        path = self._piece("adapters", name, task, seed, key)
        if path.is_dir():
            return path
        start = self.start(name, task, seed)
        part = self.recipe.training
        self.reporter.stage(f"train {name} · {task} · seed {seed} · {rate:g}")
        with timed(self.seconds, "train"):
            train_adapter(
                self._classifier(task, seed),
                start,
                self.data[task].train,
                self.tokenizer,
                regression=self._head(task)[1],
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
                progress=self.reporter.step,
            )
        self._count(key)
        return path

    def _count(self, adapter_key: str) -> None:
        """Tell the progress of an adapter once, whether it was trained now or not needed."""
        if adapter_key not in self._counted:
            self._counted.add(adapter_key)
            self.reporter.advance(TRAINING_UNITS)

    def _piece(self, kind: str, group: str, task: str, seed: int, key: str) -> Path:
        folder = f"{slug(task)}-{key[:12]}"
        return self.output / kind / group / f"seed{seed}" / folder

    # Rows ---------------------------------------------------------------------------------------

    def _row(
        self,
        name: str,
        task: str,
        seed: int,
        rate: float,
        *,
        key: str,
        split: str,
        update: Update,
        head: Any,
        merge: Merge | None = None,
        weight: float | None = None,
    ) -> ResultRow:
        rows = self._split(task, split)
        labels, regression = self._head(task)
        clock: dict[str, float] = {}
        with timed(clock, "eval"), timed(self.seconds, "eval"):
            predictions = self.evaluator.predict(
                rows, update, head, num_labels=labels, regression=regression
            )
        arm, about = self.recipe.arms[name], self._tasks[task]
        truth = [r.label for r in rows]
        metrics = score(about.kind, predictions, truth, labels)
        answer = majority(self.data[task].train, about.kind)
        constant = score(about.kind, np.full(len(rows), answer), truth, labels)
        row = ResultRow(
            task=task,
            arm=name,
            start=arm.start,
            solver=arm.solver,
            granularity=arm.granularity if arm.solver else None,
            constraint=arm.constraint,
            learning_rate=rate,
            method=SINGLE if merge is None else merge.method,
            weight=weight,
            metric=about.metric,
            value=metrics[about.metric],
            seed=seed,
            n=len(rows),
            split=split,
            key=key,
            options=merge.arguments if merge else {},
            metrics=metrics,
            majority=constant[about.metric],
            seconds=round(clock["eval"], 3),
        )
        append_rows(self.output / ROWS, [row])
        self._rows[key] = row
        self.reporter.row(row)
        self.reporter.advance(1)
        return row

    def _split(self, task: str, split: str) -> list[Row]:
        return self.data[task].selection if split == "selection" else self.data[task].test

    def single(self, name: str, seed: int, rate: float, split: str) -> list[ResultRow]:
        """Every task under its own adapter alone."""
        arm = self.recipe.arms[name]
        found = []
        for task in self._tasks:
            adapter_key = self.adapter_key(arm, task, seed, rate)
            key = self.row_key(task, split, [adapter_key], None, 1.0)
            self._wanted.add(key)
            row = self._rows.get(key)
            if row is None:
                adapter = read_adapter(self.adapter(name, task, seed, rate))
                self.reporter.stage(f"evaluate {name} · {task} · own adapter")
                row = self._row(
                    name, task, seed, rate, key=key, split=split,
                    update=adapter.layers, head=adapter.modules,
                )  # fmt: skip
            else:
                self.reporter.advance(1)
            self._count(adapter_key)
            found.append(row)
        return found

    def learning_rate(self, name: str) -> float:
        """The arm's learning rate: the best mean single-task score on the selection split.

        Or the lowest one within the recipe's `rate_tolerance` of it. Chosen at the first seed, for
        all tasks together, never by a merge and never on test rows.
        """
        rates = self.recipe.learning_rates_of(name)
        if len(rates) == 1:
            return rates[0]
        seed = self.recipe.seeds_of(name)[0]
        scores = {}
        for rate in rates:
            rows = self.single(name, seed, rate, "selection")
            scores[rate] = sum(r.value for r in rows) / len(rows)
        enough = max(scores.values()) - self.recipe.training.rate_tolerance
        return min(rate for rate, value in scores.items() if value >= enough)

    def merges(self, name: str, seed: int, rate: float) -> None:
        """Every merge of the arm's adapters, scored on every task."""
        arm = self.recipe.arms[name]
        keys = [self.adapter_key(arm, t, seed, rate) for t in self._tasks]
        adapters: dict[str, Adapter] | None = None
        for merge in self.recipe.merges:
            for weight in merge.weights:
                wanted = {t: self.row_key(t, "test", keys, merge, weight) for t in self._tasks}
                self._wanted.update(wanted.values())
                missing = [t for t in self._tasks if wanted[t] not in self._rows]
                self.reporter.advance(len(wanted) - len(missing))
                saved = self._merged_path(name, seed, merge, weight, keys)
                if not missing and (not self.recipe.save_merged or saved.is_dir()):
                    continue
                if adapters is None:
                    adapters = {
                        t: read_adapter(self.adapter(name, t, seed, rate)) for t in self._tasks
                    }
                self.reporter.stage(f"merge {name} · {merge.method} · weight {weight:g}")
                with timed(self.seconds, "merge"):
                    merged = merge_layers(
                        [a.layers for a in adapters.values()],
                        method=merge.method,
                        weights=weight,
                        seed=seed,
                        **merge.arguments,
                    )
                    if self.recipe.save_merged and not saved.is_dir():
                        save_merged(
                            saved,
                            merged,
                            list(adapters.values()),
                            [weight] * len(adapters),
                            seed=seed,
                            rank=merge.arguments.get("rank"),
                            options=merge.arguments,
                            names=list(adapters),
                        )
                for task in missing:
                    self._row(
                        name, task, seed, rate, key=wanted[task], split="test",
                        update=merged.layers, head=adapters[task].modules,
                        merge=merge, weight=weight,
                    )  # fmt: skip

    def _merged_path(
        self, name: str, seed: int, merge: Merge, weight: float, keys: list[str]
    ) -> Path:
        key = fingerprint([keys, merge.model_dump(exclude={"weights"}), weight, PIECES])
        folder = f"{merge.method}-w{weight:g}-{key[:12]}"
        return self.output / "merged" / name / f"seed{seed}" / folder

    # The whole ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse, before anything is written, what could not be carried out.

        Raises:
            AssetError: the base model or a task's data cannot be found.
            UnknownNameError: a target matches no layer.
            TaskError: a task with one label or too few rows.
            SubspaceError: a rank larger than a layer.
        """
        layers = target_layers(self._trunk, self.recipe.adapter.targets)
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

    def expected_rows(self) -> int:
        """The number of rows of the finished run."""
        tasks = len(self._tasks)
        merges = sum(len(m.weights) for m in self.recipe.merges)
        total = 0
        for name in self.recipe.arms:
            rates = len(self.recipe.learning_rates_of(name))
            total += tasks * (rates if rates > 1 else 0)
            total += tasks * len(self.recipe.seeds_of(name)) * (1 + merges)
        return total

    def _expected_trainings(self) -> int:
        tasks = len(self._tasks)
        return sum(
            tasks * (len(self.recipe.learning_rates_of(name)) - 1 + len(self.recipe.seeds_of(name)))
            for name in self.recipe.arms
        )

    def execute(self) -> list[ResultRow]:
        """Do what is missing; returns the rows that belong to this recipe, old and new.

        Raises:
            OrthomergeError: another run is at work in the same folder, or what `check` raises.
        """
        self.check()
        self.output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.output / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise OrthomergeError(
                f"another run is at work in '{self.output}': wait for it, or choose another "
                "--output."
            ) from problem
        try:
            for name in (OTHER_ROWS, ROWS):
                if (self.output / name).is_file():
                    self._rows |= {r.key: r for r in read_rows(self.output / name)}
            if self._text:
                write_text(self.output / RECIPE, self._text)
            began = datetime.now(UTC).isoformat(timespec="seconds")
            self.reporter.total(self.expected_rows() + TRAINING_UNITS * self._expected_trainings())
            try:
                for name in self.recipe.arms:
                    rate = self.learning_rate(name)
                    for seed in self.recipe.seeds_of(name):
                        self.single(name, seed, rate, "test")
                        self.merges(name, seed, rate)
            finally:
                self._write_record(began)
            self._set_others_aside()
        finally:
            lock.release()
        return [r for k, r in self._rows.items() if k in self._wanted]

    def _set_others_aside(self) -> None:
        """Move rows of an earlier form of the recipe out of the results, into a file of their own.

        They are looked into again when the recipe is changed back.
        """
        others = [r for k, r in self._rows.items() if k not in self._wanted]
        if not others:
            return
        mine = [r for k, r in self._rows.items() if k in self._wanted]
        for name, rows in ((OTHER_ROWS, others), (ROWS, mine)):
            write_text(self.output / name, "".join(r.to_json() + "\n" for r in rows))

    def _write_record(self, began: str) -> None:
        path = self.output / RUN
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        seconds = dict(before.get("seconds", {}))
        for stage, value in self.seconds.items():
            seconds[stage] = round(seconds.get(stage, 0.0) + value, 1)
        record = {
            "name": self.recipe.name,
            "command": self._command,
            "recipe": self._text,
            "version": version("orthomerge"),
            "versions": {
                p: version(p)
                for p in ("orthomerge", "torch", "transformers", "peft", "accelerate", "numpy")
            }
            | {"python": platform.python_version()},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {sys.platform}",
            "started": before.get("started", began),
            "base": {
                "id": self.recipe.base,
                "source": self.base.source,
                "sha256": self.base.sha256,
            },
            "expected_rows": self.expected_rows(),
            "tasks": [self._about(t) for t in self._tasks.values()],
            "seconds": seconds,
        }
        write_json(path, record)

    def _about(self, task: Task) -> dict[str, Any]:
        return {
            "name": task.name,
            "title": task.title,
            "kind": task.kind,
            "metric": task.metric,
            "licence": task.licence,
            "source": task.source,
            "made": task.made,
        }


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
