"""The pieces of a run: statistics, starts, adapters, Fisher information, each made once.

Every piece lies in a folder or file named after the hash of all it depends on (see `keys`). A
piece that is there is therefore the right one, and it is made only when something asks for it. One
that was damaged meanwhile is made again in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from orthomerge.adapters import (
    FROZEN_B,
    PEFT_START,
    OsrmConfig,
    captured,
    convert_adapters,
    new_lora,
    orthonormal_B,
    plan_ranks,
    read_adapter,
    save_start,
    start_adapter,
    unit_rows,
)
from orthomerge.experiment.costs import Costs
from orthomerge.experiment.keys import Keys
from orthomerge.experiment.progress import Reporter
from orthomerge.experiment.sound import kept, read_folder
from orthomerge.fisher import Fisher, load_fisher, save_fisher
from orthomerge.io.files import atomic_path, derive_seed
from orthomerge.models.loading import (
    exact_device,
    load_classifier,
    load_language_model,
    load_trunk,
    tokenizer_hash,
)
from orthomerge.records import start_record
from orthomerge.statistics import Statistics, batches, collect_statistics, sample_texts
from orthomerge.training import Charged, TrainingSettings, recover_adapter, train_adapter
from orthomerge.tuning import fisher_on_texts


class Pieces:
    """Makes the pieces of one recipe in one output folder."""

    def __init__(self, keys: Keys, *, reporter: Reporter, costs: Costs) -> None:
        self.keys = keys
        self.reporter, self.costs = reporter, costs
        self._recipe = keys.recipe
        self._stats: dict[Path, Statistics] = {}
        self._whole: set[Path] = set()

    @cached_property
    def trunk(self) -> Any:
        """The base model without a head, until a training wants the room."""
        return load_trunk(self.keys.base.path_or_id).to(exact_device())

    def statistics(
        self,
        task: str,
        granularity: str,
        samples: int | None = None,
        targets: Sequence[str] | None = None,
    ) -> Statistics:
        """A task's statistics, from its file or collected now."""
        path = self.keys.stats_path(task, granularity, samples, targets)
        if path in self._stats:
            return self._stats[path]
        found = kept(path, Statistics.load, self.reporter)
        if found is None:
            sample, prompt = self._sample(task, samples), self.keys.prompts.get(task)
            self.reporter.stage(f"statistics of {task} ({granularity})")
            done = 0

            def count(size: int) -> None:
                nonlocal done
                done += size
                self.reporter.step(done, len(sample))

            with self.costs.stage("stats"):
                collect_statistics(
                    self.trunk,
                    self._batches(task, sample),
                    targets or self._recipe.adapter.targets,
                    granularity=granularity,
                    task=task,
                    model_id=self.keys.base.name,
                    model_sha256=self.keys.base.sha256,
                    tokenizer_hash=tokenizer_hash(self.keys.tokenizer),
                    prompt=prompt.fingerprint if prompt else None,
                    progress=count,
                ).save(path, replace=True)
            found = Statistics.load(path)
        self._stats[path] = found
        return found

    def _is_whole(self, folder: Path, **parts: bool) -> bool:
        """Whether a start or an adapter is there and can be read, with such parts."""
        if folder not in self._whole:
            if kept(folder, partial(read_folder, **parts), self.reporter) is None:
                return False
            self._whole.add(folder)
        return True

    def _batches(
        self, task: str, texts: Sequence[tuple[str, str | None]]
    ) -> Iterator[dict[str, Any]]:
        """Texts as the task's training reads them: in its prompt, where there is one."""
        if self.keys.in_words:
            return self.keys.wording(task).batches(texts)
        return batches(texts, self.keys.tokenizer, max_length=self._recipe.data.max_length)

    def _sample(self, task: str, samples: int | None = None) -> list[tuple[str, str | None]]:
        """The texts behind a task's statistics and its Fisher information."""
        part = self._recipe.statistics
        texts = [(r.text, r.pair) for r in self.keys.data[task].train]
        return sample_texts(texts, samples or part.samples, derive_seed(part.seed, task))

    def start(self, name: str, task: str, seed: int) -> Path:
        """A task's start folder."""
        path = self.keys.start_path(name, task, seed)
        arm, shape = self._recipe.arms[name], self._recipe.adapter_of(name)
        if self._is_whole(path, kept_out=arm.constraint == "project"):
            return path
        draw = self._draw(name, task, seed)
        others, own, config = self._problem(name, task, draw) if arm.solver else ([], None, None)
        if config is not None and config.constraint == "penalty":
            # The start is that of a free training; what is charged comes with the training.
            config = replace(config, constraint="init")
        ranks = plan_ranks(others, shape.rank, arm.quiet)[0] if arm.quiet else None
        self.reporter.stage(f"start {name} of {task}")
        with self.costs.stage("init"):
            model = new_lora(
                self._model(task, seed),
                targets=shape.targets,
                rank=shape.rank,
                alpha=shape.alpha,
                dropout=shape.dropout,
                rslora=shape.rslora,
                task_type=self.keys.task_type,
                seed=draw,
                ranks=ranks,
                gaussian=arm.start == "gaussian",
            )
            directions, seen = None, {}
            if arm.start == "default_unit":
                unit_rows(model)
            elif arm.constraint == FROZEN_B:
                orthonormal_B(model, seed=draw)
            elif config is not None:
                started = start_adapter(model, others, own, config)
                directions, seen = started.directions, captured(started.chosen)
            base, files = self.keys.base, self.keys.stats_paths(name) if config else {}
            record = start_record(
                config, base=base.name, base_sha256=base.sha256, own=files.pop(task, None),
                others=list(files.values()), quiet_energy=arm.quiet, captured=seen,
                beside=path.parent, start=arm.start, task=task, drawn=draw,
            )  # fmt: skip
            with atomic_path(path, replace=True) as folder:
                save_start(model, folder, directions, record=record)
        return path

    def _draw(self, name: str, task: str, seed: int) -> int:
        """What a task's start and its penalty draw under."""
        shared = self._recipe.arms[name].seed_policy == "shared"
        return derive_seed(seed) if shared else derive_seed(seed, task)

    def _charged(self, name: str, task: str, seed: int) -> Charged | None:
        """What the constraint "penalty" charges a training for; None under another constraint."""
        if self._recipe.arms[name].constraint != "penalty":
            return None
        return Charged(*self._problem(name, task, self._draw(name, task, seed)))

    def _problem(
        self, name: str, task: str, seed: int
    ) -> tuple[list[Statistics], Statistics, OsrmConfig]:
        """Others' statistics, own ones, how to choose and how to train."""
        arm = self._recipe.arms[name]
        config = OsrmConfig(
            solver=arm.solver or PEFT_START,
            granularity=arm.granularity,
            constraint=arm.constraint,
            share=arm.share,
            room=arm.room,
            strength=arm.strength,
            penalty_moment=arm.penalty_moment,
            isotropic_share=arm.isotropic_share,
            seed=seed,
            options=arm.options,
        )
        found = {
            t: self.statistics(t, arm.granularity, arm.samples, arm.targets)
            for t in self.keys.tasks_of(name)
        }
        return [s for t, s in found.items() if t != task], found[task], config

    def _model(self, task: str, seed: int) -> Any:
        """What an adapter is trained on: a language model for words, else the base with a head.

        The task's head is fresh and the same for every arm of one seed.
        """
        if self.keys.in_words:
            return load_language_model(self.keys.base.path_or_id, name=self.keys.base.name)
        labels, regression = self.keys.head(task)
        return load_classifier(
            self.keys.base.path_or_id,
            num_labels=labels,
            regression=regression,
            seed=derive_seed(seed, task, "head"),
            name=self.keys.base.name,
        )

    def adapter(self, name: str, task: str, seed: int, rate: float) -> Path:
        """A task's trained adapter folder."""
        path = self.keys.adapter_path(name, task, seed, rate)
        how = self._recipe.arms[name].convert
        if self._is_whole(path, losses=how is None or bool(how.recover)):
            return path
        if how:
            return self._converted(name, task, seed, rate, path)
        charged = self._charged(name, task, seed)
        start, key = self.start(name, task, seed), self.keys.adapter_key(name, task, seed, rate)
        told, rate_of = self.keys.settings(task)
        held = told.pop("seed", seed)
        self.__dict__.pop("trunk", None)
        self.reporter.stage(f"train {name} · {task} · seed {seed} · {rate:g}")
        with atomic_path(path, replace=True) as folder, self.costs.stage("train"):
            train_adapter(
                self._model(task, seed),
                start,
                self.keys.data[task].train,
                self.keys.tokenizer,
                regression=self.keys.head(task)[1],
                settings=TrainingSettings(
                    **told, learning_rate=rate_of(rate), max_length=self._recipe.data.max_length
                ),
                prompt=self.keys.prompts.get(task),
                constraint=self._recipe.arms[name].constraint,
                charged=charged,
                seed=derive_seed(held, task, "training"),
                output=folder,
                record={"arm": name, "task": task, "seed": seed, "rate": rate_of(rate), "key": key},
                progress=self.reporter.step,
                report_to=self._recipe.training.report_to,
                logs=self.keys.output / "logs",
                label=f"{name}/seed{seed}/{path.name}",
            )
        return path

    def _converted(self, name: str, task: str, seed: int, rate: float, path: Path) -> Path:
        """The adapter of the arm it is made from, converted, and a few steps of training after."""
        arm = self._recipe.arms[name]
        how = arm.convert
        assert how is not None
        source = self.adapter(how.source, task, seed, rate)
        about = (arm.granularity, arm.samples, arm.targets)
        found = {t: self.statistics(t, *about) for t in self.keys.tasks_of(name)}
        own = found.pop(task)
        self.reporter.stage(f"convert {name} · {task} · seed {seed}")
        with atomic_path(path, replace=True) as folder, self.costs.stage("convert"):
            plain = folder.with_name("converted") if how.recover else folder
            convert_adapters(
                [source], plain, statistics=[own], others=list(found.values()),
                config=how.config(derive_seed(seed, task)),
            )  # fmt: skip
            told, rate_of = self.keys.settings(task)
            held = told.pop("seed", seed)
            told["max_steps"] = how.recover
            if not how.recover:
                return path
            recover_adapter(
                self._model(task, seed),
                plain,
                self.keys.data[task].train,
                self.keys.tokenizer,
                regression=self.keys.head(task)[1],
                settings=TrainingSettings(
                    **told,
                    learning_rate=how.learning_rate or rate_of(rate),
                    max_length=self._recipe.data.max_length,
                ),
                prompt=self.keys.prompts.get(task),
                seed=derive_seed(held, task, "recovery"),
                output=folder,
                record={"arm": name, "task": task, "seed": seed},
                progress=self.reporter.step,
            )
        return path

    def fisher(self, name: str, task: str, seed: int, rate: float) -> Fisher:
        """The Fisher information of a task's trained adapter, on the sample of its statistics."""
        path = self.keys.fisher_path(name, task, seed, rate)
        adapter = read_adapter(self.adapter(name, task, seed, rate))
        read = partial(load_fisher, adapter_sha256=adapter.sha256)
        whole = kept(path, read, self.reporter)
        if whole is None:
            self.reporter.stage(f"Fisher information of {name} · {task} · seed {seed}")
            with self.costs.stage("fisher"):
                found, meta = fisher_on_texts(
                    adapter,
                    self.keys.tasks[task],
                    self._sample(task),
                    self.keys.base,
                    self.keys.tokenizer,
                    max_length=self._recipe.data.max_length,
                    prompt=self.keys.prompts.get(task),
                )
            save_fisher(path, found, meta, replace=True)
            whole = read(path)
        return whole
