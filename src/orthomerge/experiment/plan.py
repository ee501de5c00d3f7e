"""What a recipe will take, before it is run: jobs, hours, disk, memory; no data and no weights.

Time is counted in operations, from the model's shapes: a pass of `n` tokens through `P` parameters
(embeddings left out) takes `2 P n`, a LoRA training step twice that (no gradient of the base).
Texts count at their longest (`max_length`), and every answer that a decoder is to weigh
at a pass of its own, so hours are rather too many than too few.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from orthomerge.errors import RecipeError
from orthomerge.experiment.graph import Graph
from orthomerge.experiment.jobs import KINDS, Job
from orthomerge.experiment.keys import Keys
from orthomerge.experiment.recipe import Recipe
from orthomerge.experiment.recipe_file import parse_recipe
from orthomerge.experiment.sizes import (
    BaseSize,
    base_size,
    estimate_needs,
    largest_rank,
    widest_targets,
)
from orthomerge.experiment.skeletons import find_skeleton
from orthomerge.experiment.throughput import Throughput
from orthomerge.io.documents import Unreadable, parse_yaml
from orthomerge.models.assets import ResolvedModel
from orthomerge.tasks import TaskData

# Operations of an eigendecomposition of a d×d matrix are about this times d³.
DECOMPOSITION = 9
# Operations of merging methods for each entry of an update and each adapter, roughly.
MERGING = 20


class _Unseen(Keys):
    """The keys of a recipe whose base and data nobody has looked at: names stand in for hashes."""

    @cached_property
    def base(self) -> ResolvedModel:
        return ResolvedModel("", "path", None, self.recipe.base, self.recipe.base)

    @cached_property
    def data(self) -> dict[str, TaskData]:
        return {name: TaskData([], [], [], name) for name in self.tasks}


class Plan:
    """The jobs of a whole recipe and what they take."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        skeleton, self.shapes_from = find_skeleton(recipe.base)
        self.size: BaseSize = base_size(
            skeleton, widest_targets(recipe), in_words=recipe.form == "text"
        )
        self._encodes = bool(getattr(skeleton.config, "is_encoder_decoder", False))
        self._keys = _Unseen(recipe, Path("plan"))
        graph = Graph(self._keys)
        evaluations = graph.evaluations({}, assume=True)
        self.rows = len({key for asked in evaluations for _, key in asked.keys})
        self.jobs = list(graph.jobs(evaluations, {}, lambda path: False).values())
        self.needs = estimate_needs(recipe, self.size)

    def work(self, job: Job) -> dict[str, float]:
        """Operations of a job by stage."""
        data, length = self.recipe.data, self.recipe.data.max_length
        token, samples = 2.0 * self.size.multiplied, self.recipe.statistics.samples
        if job.kind == "stats":
            own = job.arguments[2] or samples
            moments = sum(2 * d * d for d in self.size.inputs)
            return {"stats": own * length * (token - 2 * self.size.output + moments)}
        if job.kind == "start":
            solved = self.recipe.arms[job.arguments[0]].solver is not None
            return {"init": DECOMPOSITION * sum(d**3 for d in self.size.inputs) if solved else 0}
        if job.kind == "train":
            return self._adapter_work(*job.arguments[:2])
        if job.kind == "fisher":
            return {"fisher": 2 * token * length * samples}
        asked = job.arguments[0]
        rows = data.selection if asked.split == "selection" else _count(data.test)
        passes = sum(self._passes(task) for task, _ in asked.keys)
        work = {"eval": token * length * rows * passes}
        if job.kind == "merge":
            work["merge"] = MERGING * self.size.updates() * len(asked.keys)
        return work

    def _passes(self, task: str) -> int:
        """Passes that a row of a task takes to be scored: a decoder reads each answer by itself.

        Answers that begin alike, as those of one token do, share a pass then; how many do is the
        tokenizer's to say, so all are counted. An encoder-decoder reads the text once.
        """
        if self._keys.scoring_of(task) != "likelihood" or self._encodes:
            return 1
        return len(self._keys.prompts[task].answers)

    def _adapter_work(self, arm: str, task: str) -> dict[str, float]:
        """Operations of a training, or of a conversion and the steps that follow it."""
        step_row = 4.0 * self.size.multiplied * self.recipe.data.max_length
        how = self.recipe.arms[arm].convert
        if how is None:
            epochs = self._keys.settings(task)[0]["epochs"]
            return {"train": step_row * epochs * _count(self.recipe.data.train)}
        return {
            "convert": DECOMPOSITION * sum(d**3 for d in self.size.inputs),
            "train": step_row * how.recover * self.recipe.training.batch_size,
        }

    def by_stage(self) -> dict[str, float]:
        """Operations of the whole recipe by stage."""
        total: Counter[str] = Counter()
        for job in self.jobs:
            total.update(self.work(job))
        return dict(total)

    def disk(self) -> dict[str, int]:
        """Bytes by kind of what is kept, statistics at their fullest."""
        adapter = 4 * self.size.adapter(largest_rank(self.recipe))
        count = Counter(job.kind for job in self.jobs)
        tested = sum(j.kind == "merge" and j.arguments[0].split == "test" for j in self.jobs)
        merged = adapter * len(self.recipe.tasks) * tested if self.recipe.save_merged else 0
        return {
            "stats": count["stats"] * self.size.moments(),
            "start": count["start"] * adapter,
            "train": count["train"] * adapter,
            "fisher": count["fisher"] * 4 * self.size.updates(),
            "eval": 0,
            "merge": merged,
        }

    def estimate(self, throughput: Throughput, workers: int) -> dict[str, Any]:
        """Jobs, hours, disk and memory by kind, and the wall time on so many workers."""
        hours = {job.id: throughput.seconds(self.work(job)) / 3600 for job in self.jobs}
        disk = self.disk()
        kinds: dict[str, dict[str, Any]] = {}
        for kind in KINDS:
            of_kind = [job for job in self.jobs if job.kind == kind]
            if of_kind:
                kinds[kind] = {
                    "jobs": len(of_kind),
                    "hours": sum(hours[job.id] for job in of_kind),
                    "disk": disk[kind],
                    "memory": self.needs[kind].memory,
                }
        return {
            "recipe": self.recipe.name,
            "base": self.recipe.base,
            "parameters": self.size.parameters,
            "shapes": self.shapes_from,
            "throughput": {"source": throughput.source, "rates": throughput.rates},
            "rows": self.rows,
            "kinds": kinds,
            "jobs": len(self.jobs),
            "hours": sum(hours.values()),
            "disk": sum(disk.values()),
            "memory": max(entry["memory"] for entry in kinds.values()),
            "workers": workers,
            "wall_hours": _wall(self.jobs, hours, workers),
        }


def throughput_of_run(record: Mapping[str, Any], source: str) -> Throughput:
    """What a finished run achieved: the operations of its recipe over its seconds, by stage.

    Raises:
        RecipeError: its recipe cannot be read, or it trained nothing.
    """
    try:
        done = Plan(parse_recipe(parse_yaml(record["recipe"]))).by_stage()
    except Unreadable as problem:
        raise RecipeError(f"the recipe in {source} cannot be read: {problem}.") from problem
    seconds = {stage: s for stage, s in record["seconds"].items() if s > 0}
    rates = {stage: n / seconds[stage] for stage, n in done.items() if n and stage in seconds}
    if "train" not in rates:
        raise RecipeError(f"{source} tells no time of training: name the run.json of another run.")
    return Throughput(rates, f"measured by the run of {source} ({record.get('machine', '?')})")


def _count(rows: int | str) -> int:
    """Rows of a split; all of a task are counted as GLUE's largest, MNLI, has them."""
    return rows if isinstance(rows, int) else 392_702


def _wall(jobs: list[Job], hours: dict[str, float], workers: int) -> float:
    """Hours until all jobs are done when each of so many workers takes the next that can begin."""
    waiting = {job.id: {need for need in job.needs if need in hours} for job in jobs}
    readers: dict[str, list[str]] = {}
    for job in jobs:
        for need in waiting[job.id]:
            readers.setdefault(need, []).append(job.id)
    place = {job.id: n for n, job in enumerate(jobs)}
    ready = [n for name, n in place.items() if not waiting[name]]
    heapq.heapify(ready)
    at_work: list[tuple[float, str]] = []
    now = 0.0
    while ready or at_work:
        while ready and len(at_work) < workers:
            name = jobs[heapq.heappop(ready)].id
            heapq.heappush(at_work, (now + hours[name], name))
        now, done = heapq.heappop(at_work)
        for reader in readers.get(done, []):
            waiting[reader].discard(done)
            if not waiting[reader]:
                heapq.heappush(ready, place[reader])
    return now
