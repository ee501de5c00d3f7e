"""How near a distilled merge comes to the single adapters: `python -m benchmarks.distillation RUN`.

RUN is the folder of a finished run (its adapters are the teachers). Each arm's adapters are merged,
distilled without labels from texts of the training rows, and scored on the run's test rows. Rows
are kept in `OUTPUT/results.jsonl`, and what each distillation cost in `OUTPUT/costs.jsonl`. Called
again, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orthomerge.adapters import read_adapter
from orthomerge.evaluation.classification import Evaluator, score
from orthomerge.experiment import Run, load_recipe
from orthomerge.experiment.steps import adapter_steps
from orthomerge.io.files import append_lines, fingerprint
from orthomerge.io.rows import ResultRow, append_rows, read_rows
from orthomerge.training.distillation import DistillSettings, distill_adapters


def chosen_rate(run: Run, arm: str) -> float:
    """The learning rate of the arm's kept rows on test rows."""
    rows = [r for r in read_rows(run.output / "results.jsonl") if r.arm == arm]
    rates = {r.learning_rate for r in rows if r.split == "test"}
    if len(rates) != 1:
        raise SystemExit(f"arm '{arm}' has test rows at the rates {sorted(rates)}: finish the run.")
    return rates.pop()


def distil(run: Run, arm: str, seed: int, options: dict[str, Any], cache: Path) -> Any:
    """The distilled merge of one arm and seed."""
    steps = adapter_steps(run.exp, arm, seed, chosen_rate(run, arm))
    folders = [run.space.get(step) for step in steps.values()]
    texts = [[(row.text, row.pair) for row in run.exp.data[task].train] for task in steps]
    settings = DistillSettings(
        steps=options["steps"], batch_size=options["batch_size"], seed=seed,
        learning_rate=options["learning_rate"],
    )  # fmt: skip
    return distill_adapters(
        folders, texts, weights=options["weight"], rank=options["rank"],
        samples=options["samples"], settings=settings, cache=cache,
    )  # fmt: skip


def score_merge(
    run: Run, arm: str, seed: int, options: dict[str, Any], found: Any, evaluator: Evaluator
) -> list[ResultRow]:
    """One row per task on the run's test rows, each with the task's own head."""
    rows, rate, part = [], chosen_rate(run, arm), run.recipe.arms[arm]
    for task, step in adapter_steps(run.exp, arm, seed, rate).items():
        about, data = run.exp.tasks[task], run.exp.data[task].test
        labels, regression = run.exp.head(task)
        head = read_adapter(run.space.get(step)).modules
        began = time.perf_counter()
        given = evaluator.predict(
            data, found.merged.layers, head, num_labels=labels, regression=regression
        )
        metrics = score(about.kind, given, [r.label for r in data], labels)
        key = fingerprint([run.exp.key(step), "distill", options, task])
        rows.append(
            ResultRow(
                task=task, arm=arm, start=part.start, solver=part.solver, granularity=None,
                constraint=part.constraint, learning_rate=rate, method="distill",
                weight=options["weight"], metric=about.metric, value=metrics[about.metric],
                seed=seed, n=len(data), split="test", key=key, options=options, metrics=metrics,
                seconds=round(time.perf_counter() - began, 3),
            )
        )  # fmt: skip
    return rows


def main() -> None:
    """Do what is missing, print the mean score of every arm, seed and setting."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("run", type=Path)
    words.add_argument("--output", type=Path, default=Path("results/distill"))
    words.add_argument("--arms", default="default,penalty")
    words.add_argument("--seeds", default="0,1,2")
    words.add_argument("--ranks", default="16")
    words.add_argument("--weights", default="auto", help="of the merge to begin from")
    words.add_argument("--steps", default="100")
    words.add_argument("--samples", type=int, default=100)
    words.add_argument("--batch-size", type=int, default=8)
    words.add_argument("--learning-rate", type=float, default=1e-3)
    given = words.parse_args()
    recipe, text = load_recipe(given.run / "recipe.yaml")
    run = Run(recipe, given.run, text=text)
    run.check()
    given.output.mkdir(parents=True, exist_ok=True)
    kept = given.output / "results.jsonl"
    known = read_rows(kept) if kept.exists() else []
    evaluator = Evaluator(
        run.exp.base.path_or_id, run.exp.tokenizer, max_length=recipe.data.max_length
    )
    for arm, seed, rank, steps, weight in (
        (arm, int(seed), int(rank), int(steps), None if weight == "auto" else float(weight))
        for rank in given.ranks.split(",")
        for steps in given.steps.split(",")
        for weight in given.weights.split(",")
        for seed in given.seeds.split(",")
        for arm in given.arms.split(",")
    ):
        options = {
            "rank": rank, "steps": steps, "samples": given.samples, "weight": weight,
            "batch_size": given.batch_size, "learning_rate": given.learning_rate,
        }  # fmt: skip
        mine = [r for r in known if (r.arm, r.seed, r.options) == (arm, seed, options)]
        if len(mine) < len(run.exp.tasks_of(arm)):
            found = distil(run, arm, seed, options, given.run / "teachers")
            mine = score_merge(run, arm, seed, options, found, evaluator)
            cost = {"arm": arm, "seed": seed, "options": options, "seconds": found.seconds,
                    "scale": found.scale, "texts": sum(found.texts.values()),
                    "best": asdict(found.best)}  # fmt: skip
            append_lines(given.output / "costs.jsonl", [json.dumps(cost)])
            append_rows(kept, mine)
        mean = 100 * sum(r.value for r in mine) / len(mine)
        print(f"{arm:>12} seed {seed} rank {rank} steps {steps}: {mean:.1f}", flush=True)


if __name__ == "__main__":
    main()
