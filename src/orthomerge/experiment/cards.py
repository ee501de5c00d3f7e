"""The scores of a run in the cards of the merges that it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import isfinite

from orthomerge.errors import AdapterError
from orthomerge.experiment.experiment import Experiment
from orthomerge.experiment.steps import MergeStep, Scoring
from orthomerge.io.rows import SINGLE, ResultRow
from orthomerge.records import CardScore, add_scores


def write_scores(exp: Experiment, asked: Iterable[Scoring], rows: Sequence[ResultRow]) -> None:
    """Write what every kept merge scored on test rows into its card, beside each task alone."""
    by_key = {row.key: row for row in rows}
    alone = {
        (row.arm, row.seed, row.task): row.value
        for row in rows
        if row.method == SINGLE and row.split == "test"
    }
    for step in asked:
        if not isinstance(step, MergeStep) or step.split != "test":
            continue
        folder = step.folder(exp)
        scored = [by_key[key] for key in exp.row_keys(step).values() if key in by_key]
        told = [_score(exp, row, alone) for row in scored if isfinite(row.value)]
        if folder.is_dir() and told:
            with suppress(AdapterError):  # altered since: 'orthomerge verify' tells, a run goes on
                add_scores(folder, told)


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _score(exp: Experiment, row: ResultRow, alone: dict[tuple[str, int, str], float]) -> CardScore:
    return CardScore(
        task=row.task,
        metric=row.metric,
        value=row.value,
        n=row.n,
        alone=_finite(alone.get((row.arm, row.seed, row.task))),
        majority=_finite(row.majority),
        by=f"the run {exp.recipe.name} (arm {row.arm}, seed {row.seed})",
    )
