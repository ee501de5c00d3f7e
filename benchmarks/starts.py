"""What each start sees of its own task and of the others, and what projecting costs a step.

python -m benchmarks.starts          # a minute on two cores; the tasks of recipes/offline8.yaml
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from benchmarks.timing import median_seconds, save
from orthomerge.adapters import (
    OsrmConfig,
    Projection,
    excluded_directions,
    initialize_osrm_weights,
    new_lora,
)
from orthomerge.experiment import load_recipe
from orthomerge.io.files import derive_seed
from orthomerge.models.assets import resolve_model
from orthomerge.models.loading import load_backbone, load_classifier, load_tokenizer
from orthomerge.moments import leave_one_out
from orthomerge.statistics import Statistics, batches, collect_statistics, sample_texts
from orthomerge.subspace import get_solver
from orthomerge.tasks import get_task

STARTS: list[tuple[str, str, dict[str, Any]]] = [
    ("random rows", "random_orthonormal", {}),
    ("`min_eigen`", "min_eigen", {}),
    ("`min_eigen`, `floor` 0.05", "min_eigen", {"floor": 0.05}),
    ("`contrastive`, `balance` 0.01", "contrastive", {"balance": 0.01}),
    ("`contrastive`, `balance` 0.1", "contrastive", {"balance": 0.1}),
    ("`contrastive`, `balance` 1", "contrastive", {"balance": 1.0}),
]


def statistics(granularity: str = "token") -> list[Statistics]:
    """The statistics of offline8's tasks, 100 texts each."""
    recipe, _ = load_recipe("offline8.yaml")
    found = resolve_model(recipe.base)
    backbone, tokenizer = load_backbone(found.path_or_id), load_tokenizer(found.path_or_id)
    result = []
    for name in recipe.tasks:
        texts = [(r.text, r.pair) for r in get_task(name).data(train=320).train]
        sample = sample_texts(texts, 100, derive_seed(0, name))
        result.append(
            collect_statistics(
                backbone,
                batches(sample, tokenizer, max_length=48),
                ["query", "value"],
                granularity=granularity,
            )
        )
    return result


def starts(stats: list[Statistics], rank: int = 8) -> list[dict]:
    """Shares of energy, means over layers and tasks, and how much two tasks' rows overlap."""
    rows = []
    for title, name, options in STARTS:
        solver, own, other, overlap = get_solver(name), [], [], []
        for lead in stats[0].moments:
            moments = [s.moments[lead] for s in stats]
            found = [
                solver(o, rank, own=m, seed=derive_seed(t, lead), **options)
                for t, (o, m) in enumerate(zip(leave_one_out(moments), moments, strict=True))
            ]
            own += [s.captured_own / s.total_own for s in found]
            other += [s.captured_other / s.total_other for s in found]
            overlap += [
                float((a.basis @ b.basis.T).square().sum()) / rank
                for a, b in itertools.combinations(found, 2)
            ]
        ratio = sorted(a / b for a, b in zip(own, other, strict=True))[len(own) // 2]
        mean = [sum(values) / len(values) for values in (own, other, overlap)]
        rows.append(
            {"start": title, "own": mean[0], "other": mean[1], "ratio": ratio, "overlap": mean[2]}
        )
    return rows


def projection(stats: list[Statistics]) -> dict:
    """Seconds of a training step of MiniLM (16 texts of 48 tokens) and of projecting after it."""
    found = resolve_model("minilm")
    base = load_classifier(found.path_or_id, num_labels=2)
    model = new_lora(base, targets=["query", "value"], rank=8, alpha=16, task_type="SEQ_CLS")
    config = OsrmConfig(solver="contrastive", constraint="project")
    initialize_osrm_weights(model, stats[1:], stats[0], config)
    held = Projection(model, excluded_directions(model, stats[1:], stats[0], config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-3)
    batch = {
        "input_ids": torch.randint(1000, 20000, (16, 48)),
        "attention_mask": torch.ones(16, 48, dtype=torch.long),
        "labels": torch.randint(0, 2, (16,)),
    }

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    took = median_seconds(step, 11)
    held.apply()
    return {
        "step_s": took,
        "projection_s": median_seconds(held.apply, 21),
        "violation": held.violation(),
    }


def main() -> None:
    """Measure both and keep the figures."""
    stats = statistics()
    save("starts", starts(stats), projection=projection(stats))


if __name__ == "__main__":
    main()
