"""A recipe carried out: rows are asked for, and only the pieces a missing row needs are made.

Every row carries a hash of all it depends on, as every piece does (see `pieces`). A run that was
stopped, or whose rows alone were kept, goes on with what is missing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from orthomerge.adapters import Adapter, read_adapter, save_merged
from orthomerge.errors import OrthomergeError
from orthomerge.evaluation import Evaluator, Update, score
from orthomerge.experiment.pieces import MERGE_GRANULARITY, PIECES, Pieces
from orthomerge.experiment.progress import Reporter, Silent, timed
from orthomerge.experiment.recipe import Merge, Recipe
from orthomerge.experiment.record import write_record
from orthomerge.files import fingerprint, write_text
from orthomerge.merging import MergedUpdate, get_method, merge_layers
from orthomerge.rows import SINGLE, ResultRow, append_rows, read_rows
from orthomerge.tasks import Row, majority

ROWS, RUN, RECIPE = "results.jsonl", "run.json", "recipe.yaml"
OTHER_ROWS = "results-of-other-recipes.jsonl"
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
        self.pieces = Pieces(
            recipe, self.output, reporter=self.reporter, seconds=self.seconds, trained=self._count
        )
        self._text = text
        self._command = command
        self._tasks = self.pieces.tasks
        self._rows: dict[str, ResultRow] = {}
        self._wanted: set[str] = set()
        self._counted: set[str] = set()
        self._unneeded = 0

    @cached_property
    def evaluator(self) -> Evaluator:
        """Scores updates on the base model."""
        return Evaluator(
            self.pieces.base.path_or_id,
            self.pieces.tokenizer,
            max_length=self.recipe.data.max_length,
        )

    def _count(self, adapter_key: str) -> None:
        """Tell the progress of an adapter once, whether it was trained now or not needed."""
        if adapter_key not in self._counted:
            self._counted.add(adapter_key)
            self.reporter.advance(TRAINING_UNITS)

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
        labels, regression = self.pieces.head(task)
        clock: dict[str, float] = {}
        with timed(clock, "eval"), timed(self.seconds, "eval"):
            predictions = self.evaluator.predict(
                rows, update, head, num_labels=labels, regression=regression
            )
        arm, about = self.recipe.arms[name], self._tasks[task]
        truth = [r.label for r in rows]
        metrics = score(about.kind, predictions, truth, labels)
        answer = majority(self.pieces.data[task].train, about.kind)
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
        return (
            self.pieces.data[task].selection
            if split == "selection"
            else self.pieces.data[task].test
        )

    def single(self, name: str, seed: int, rate: float, split: str) -> list[ResultRow]:
        """Every task under its own adapter alone."""
        arm = self.recipe.arms[name]
        found = []
        for task in self._tasks:
            adapter_key = self.pieces.adapter_key(arm, task, seed, rate)
            key = self.pieces.row_key(task, split, [adapter_key], None, 1.0)
            self._wanted.add(key)
            row = self._rows.get(key)
            if row is None:
                adapter = read_adapter(self.pieces.adapter(name, task, seed, rate))
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
        for merge in self.recipe.merges:
            weights = list(merge.weights)
            if merge.choose_from:
                best = self.choose_weight(name, seed, rate, merge)
                if best in weights:  # tested already: the rows counted for it will not come
                    self._unneeded += len(self._tasks)
                    self.reporter.advance(len(self._tasks))
                else:
                    weights.append(best)
            for weight in weights:
                self.merged(name, seed, rate, merge, weight, "test")

    def choose_weight(self, name: str, seed: int, rate: float, merge: Merge) -> float:
        """The weight of `choose_from` and `weights` with the best mean score on selection rows.

        Of weights that score alike the one closest to 1.
        """
        candidates = dict.fromkeys([*merge.weights, *merge.choose_from])
        scores = {}
        for weight in candidates:
            rows = self.merged(name, seed, rate, merge, weight, "selection")
            scores[weight] = sum(r.value for r in rows) / len(rows)
        return max(scores, key=lambda weight: (scores[weight], -abs(weight - 1)))

    def merged(
        self, name: str, seed: int, rate: float, merge: Merge, weight: float, split: str
    ) -> list[ResultRow]:
        """One merge of the arm's adapters, scored on every task."""
        arm = self.recipe.arms[name]
        keys = [self.pieces.adapter_key(arm, t, seed, rate) for t in self._tasks]
        wanted = {t: self.pieces.row_key(t, split, keys, merge, weight) for t in self._tasks}
        self._wanted.update(wanted.values())
        missing = [t for t in self._tasks if wanted[t] not in self._rows]
        self.reporter.advance(len(wanted) - len(missing))
        save = self.recipe.save_merged and split == "test"
        saved = self._merged_path(name, seed, merge, weight, keys)
        if missing or (save and not saved.is_dir()):
            adapters = self._adapters(name, seed, rate)
            self.reporter.stage(f"merge {name} · {merge.method} · weight {weight:g}")
            with timed(self.seconds, "merge"):
                update = self._merge(name, seed, rate, merge, weight, adapters)
                if save and not saved.is_dir():
                    self._save(saved, update, merge, weight, seed, adapters)
            for place, task in enumerate(self._tasks):
                if task in missing:
                    self._row(
                        name, task, seed, rate, key=wanted[task], split=split,
                        update=update.of(place), head=adapters[task].modules,
                        merge=merge, weight=weight,
                    )  # fmt: skip
        return [self._rows[key] for key in wanted.values()]

    def _adapters(self, name: str, seed: int, rate: float) -> dict[str, Adapter]:
        return {t: read_adapter(self.pieces.adapter(name, t, seed, rate)) for t in self._tasks}

    def _merge(
        self,
        name: str,
        seed: int,
        rate: float,
        merge: Merge,
        weight: float,
        adapters: dict[str, Adapter],
    ) -> MergedUpdate:
        """The merge, with the statistics or the Fisher information that its method needs."""
        needs, given = get_method(merge.method).needs, {}
        if "moments" in needs:
            given["statistics"] = [
                self.pieces.statistics(t, MERGE_GRANULARITY) for t in self._tasks
            ]
        if "fisher" in needs:
            given["fisher"] = [self.pieces.fisher(name, t, seed, rate) for t in self._tasks]
        return merge_layers(
            [a.layers for a in adapters.values()],
            method=merge.method,
            weights=weight,
            seed=seed,
            **given,
            **merge.arguments,
        )

    def _save(
        self,
        path: Path,
        merged: MergedUpdate,
        merge: Merge,
        weight: float,
        seed: int,
        adapters: dict[str, Adapter],
    ) -> None:
        save_merged(
            path,
            merged,
            list(adapters.values()),
            [weight] * len(adapters),
            seed=seed,
            rank=merge.arguments.get("rank"),
            options=merge.arguments,
            names=list(adapters),
        )

    def _merged_path(
        self, name: str, seed: int, merge: Merge, weight: float, keys: list[str]
    ) -> Path:
        key = fingerprint(
            [keys, merge.model_dump(exclude={"weights", "choose_from"}), weight, PIECES]
        )
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
        self.pieces.check()

    def expected_rows(self) -> int:
        """The number of rows of the finished run; fewer where a chosen weight is tested anyway."""
        tasks = len(self._tasks)
        merges = sum(len(m.weights) for m in self.recipe.merges)
        # Candidates are scored on selection rows, the chosen one on test rows if it is no other.
        merges += sum(
            len({*m.weights, *m.choose_from}) + 1 for m in self.recipe.merges if m.choose_from
        )
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
        about = {
            "name": self.recipe.name,
            "command": self._command,
            "recipe": self._text,
            "started": began,
            "base": self.recipe.base,
            "expected_rows": self.expected_rows() - self._unneeded,
        }
        write_record(
            self.output / RUN, about, self.pieces.base, list(self._tasks.values()), self.seconds
        )
