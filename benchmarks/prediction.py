"""Does the shift that statistics predict tell how much accuracy a merge costs?

`python -m benchmarks.prediction RUN...` takes folders of finished runs (rows, adapters and
statistics in them) and appends to results/prediction/, going on where it stopped:

- merges.jsonl: every merge of the run, its predicted shift beside its measured loss;
- leave-out.jsonl: the plain sum without one adapter, on the other tasks;
- layers.jsonl: the plain sum without one layer, on all tasks.

`python -m benchmarks.evidence` makes correlations and pages of them.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from orthomerge.adapters import Adapter, read_adapter
from orthomerge.diagnostics import Shift, couplings, predict_shift, shift_of_sum
from orthomerge.evaluation.classification import score
from orthomerge.experiment import Run, load_recipe
from orthomerge.experiment.steps import MergeStep, StatisticsStep, adapter_steps
from orthomerge.factors import LoraFactors, inner, weighted_sum
from orthomerge.io.rows import SINGLE, ResultRow, read_rows
from orthomerge.merging import MergedLayer, MergedUpdate

RESULTS = Path(__file__).parents[1] / "results" / "prediction"
# The weight of the sums that an adapter or a layer is taken out of: near the best one for all arms.
WEIGHT = 0.4


class Study:
    """One run's adapters and statistics, by arm and seed, and what was measured of them."""

    def __init__(self, folder: Path) -> None:
        self.recipe, _ = load_recipe(folder / "recipe.yaml")
        self.run = Run(self.recipe, folder)
        self.space, self.tasks = self.run.space, list(self.run.exp.tasks)
        self.rows = read_rows(folder / "results.jsonl")
        self.alone = {
            (r.arm, r.seed, r.task): r for r in self.rows
            if r.method == SINGLE and r.split == "test"
        }  # fmt: skip
        statistics = StatisticsStep.for_merging(self.run.exp)
        self.statistics = [self.space.get(step) for step in statistics.values()]

    def sittings(self) -> Iterator[tuple[str, int, float]]:
        """Arm, seed and learning rate of every set of adapters that was scored alone."""
        seen = {(r.arm, r.seed): r.learning_rate for r in self.alone.values()}
        for (arm, seed), rate in seen.items():
            yield arm, seed, rate

    def adapters(self, arm: str, seed: int, rate: float) -> list[Adapter]:
        """The adapters in the order of the tasks."""
        steps = adapter_steps(self.run.exp, arm, seed, rate)
        return [read_adapter(self.space.get(step)) for step in steps.values()]

    def scores(self, update: Any, adapters: Sequence[Adapter], tasks: Sequence[str]) -> list[float]:
        """The main score of every task named, on its test rows."""
        found = []
        for task in tasks:
            data, about = self.run.exp.data[task], self.run.exp.tasks[task]
            labels, regression = self.run.exp.head(task)
            predictions = self.space.evaluator.predict(
                data.test, update, adapters[self.tasks.index(task)].modules,
                num_labels=labels, regression=regression,
            )  # fmt: skip
            truth = [r.label for r in data.test]
            found.append(score(about.kind, predictions, truth, labels)[about.metric])
        return found


def merges(study: Study, done: set[str]) -> Iterator[dict[str, Any]]:
    """A line for every merge that was scored on all tasks of a split."""
    groups: dict[tuple, dict[str, dict[str, ResultRow]]] = defaultdict(lambda: defaultdict(dict))
    for r in study.rows:
        if r.method != SINGLE:
            groups[r.arm, r.seed, r.learning_rate, r.method, r.weight][r.split][r.task] = r
    places = {m.method: place for place, m in enumerate(study.recipe.merges)}
    for (arm, seed, rate, method, weight), splits in groups.items():
        whole = {s: v for s, v in splits.items() if len(v) == len(study.tasks)}
        name = _name(arm, seed, method, weight)
        if not whole or name in done or method not in places:
            continue
        adapters = study.adapters(arm, seed, rate)
        named = dict(zip(study.tasks, adapters, strict=True))
        step = MergeStep(arm, seed, rate, "test", places[method], weight)
        merged = step.update(study.space, named)
        shift = predict_shift(_layers(merged), adapters, study.statistics)
        yield {
            "name": name, "arm": arm, "seed": seed, "method": method, "weight": weight,
            **_figures(shift, [_cosine(merged.of(t), a) for t, a in enumerate(adapters)]),
            "alone": [study.alone[arm, seed, t].value for t in study.tasks],
            **{s: [v[t].value for t in study.tasks] for s, v in sorted(whole.items())},
        }  # fmt: skip


def leave_out(study: Study, done: set[str]) -> Iterator[dict[str, Any]]:
    """A line for every adapter: what the others gain where it is left out of the sum."""
    for arm, seed, rate in study.sittings():
        adapters, found = study.adapters(arm, seed, rate), None
        for out, task in enumerate(study.tasks):
            name = _name(arm, seed, "without", task)
            if name in done:
                continue
            found = found or couplings(adapters, study.statistics)
            weights = [0.0 if i == out else WEIGHT for i in range(len(adapters))]
            yield {
                "name": name, "arm": arm, "seed": seed, "without": task, "place": out,
                "weight": WEIGHT,
                **_figures(shift_of_sum(found, weights), _sum_cosines(adapters, weights)),
                "test": study.scores(_sum(adapters, weights), adapters, study.tasks),
            }  # fmt: skip


def layers(study: Study, done: set[str]) -> Iterator[dict[str, Any]]:
    """A line for every layer: what all tasks gain where the sum leaves it as it was."""
    for arm, seed, rate in study.sittings():
        adapters, found = study.adapters(arm, seed, rate), None
        for out in [None, *adapters[0].layers]:
            name = _name(arm, seed, "layer", out or "all kept")
            if name in done:
                continue
            found = found or couplings(adapters, study.statistics)
            weights = [WEIGHT] * len(adapters)
            by_layer = {n: [0.0] * len(adapters) if n == out else weights for n in found.layers}
            update = {n: f for n, f in _sum(adapters, weights).items() if n != out}
            yield {
                "name": name, "arm": arm, "seed": seed, "without": out, "weight": WEIGHT,
                **_figures(
                    shift_of_sum(found, by_layer), [_cosine(update, a) for a in adapters]
                ),
                "test": study.scores(update, adapters, study.tasks),
            }  # fmt: skip


def _layers(merged: MergedUpdate) -> Iterator[MergedLayer]:
    for name, update in merged.layers.items():
        yield MergedLayer(name, update, tuple(task[name] for task in merged.tasks))


def _sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LoraFactors]:
    return {n: weighted_sum([a.layers[n] for a in adapters], weights) for n in adapters[0].layers}


def _sum_cosines(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[float]:
    update = _sum(adapters, weights)
    return [_cosine(update, a) for a in adapters]


def _cosine(update: Any, adapter: Adapter) -> float:
    """The plain cosine of the merged update and the adapter's own, over all layers."""
    along = merged = own = 0.0
    for name, factors in adapter.layers.items():
        own += inner(factors, factors)
        item = update.get(name)
        if isinstance(item, LoraFactors):
            along, merged = along + inner(item, factors), merged + inner(item, item)
        elif item is not None:
            along += float((item.double() * factors.delta().double()).sum())
            merged += float(item.double().square().sum())
    return along / (merged * own) ** 0.5 if merged * own else 0.0


def _figures(shift: Shift, cosines: Sequence[float]) -> dict[str, list[float]]:
    return {
        "shift": _round(shift.total.tolist()),
        "kept": _round(shift.kept.tolist()),
        "beside": _round(shift.beside.tolist()),
        "cosine": _round(cosines),
    }


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.6g}") for v in values]


def _name(arm: str, seed: int, what: str, which: object) -> str:
    return f"{arm}/{seed}/{what}/{which}"


def main(folders: Sequence[str]) -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in (merges, leave_out, layers):
        path = RESULTS / f"{part.__name__.replace('_', '-')}.jsonl"
        done = {json.loads(line)["name"] for line in path.open()} if path.is_file() else set()
        for folder in folders:
            for line in part(Study(Path(folder)), done):
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line["name"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
