"""Made-up result rows: many arms, tasks, seeds and merges, the same on every call."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthomerge.io.analyses import BandShares, Curve, Disturbance, EnergySpectrum, to_lines
from orthomerge.io.rows import SINGLE, ResultRow

TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
ARMS = [
    "default", "default-unit", "osrm", "osrm-frozen", "osrm-centred", "eigh-random",
    "randomized", "gram-frozen", "sentence", "shared-seed", "lowrank-8", "osrm-projected",
]  # fmt: skip
MERGES = [
    *(("task_arithmetic", w, {}) for w in (0.1, 0.3, 0.5, 0.7, 1.0)),
    ("ties", 1.0, {"density": 0.2}),
    ("dare_ties", 1.0, {}),
    ("tsv_m", 1.0, {}),
    ("knots_ties", 1.0, {}),
    ("iso_c", 1.0, {}),
]


def row(
    task: str,
    arm: str,
    value: float,
    *,
    method: str = SINGLE,
    weight: float | None = None,
    seed: int = 0,
    split: str = "test",
    rate: float = 0.002,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> ResultRow:
    """One row, its key from everything that makes it another row."""
    about: dict[str, Any] = {
        "start": "default", "solver": None, "granularity": None, "constraint": "init",
        "metric": "accuracy", "n": 300, "majority": 0.5, "seconds": 0.4, "metrics": {},
    }  # fmt: skip
    key = f"{task}|{arm}|{method}|{weight}|{seed}|{split}|{rate}|{options}"
    return ResultRow(
        task=task, arm=arm, value=value, method=method, weight=weight, seed=seed, split=split,
        learning_rate=rate, options=options or {}, **({"key": key} | about | more),
    )  # fmt: skip


def fake_rows(
    arms: Sequence[str] = ARMS,
    tasks: Sequence[str] = TASKS,
    seeds: Sequence[int] = (0, 1, 2),
    merges: Sequence[tuple[str, float, dict[str, Any]]] = MERGES,
    rates: Sequence[float] = (0.001, 0.002, 0.004),
) -> list[ResultRow]:
    """A whole run: selection rows at each rate, then singles and merges at one of them."""
    draw = random.Random(7)
    rows = []
    for place, arm in enumerate(arms):
        plain = arm.startswith("default")
        rate = rates[place % len(rates)]
        about: dict[str, Any] = {
            "start": arm if plain else "eigh",
            "solver": None if plain else "eigh",
            "granularity": None if plain else "token",
            "constraint": "frozen" if "frozen" in arm else "init",
        }
        if len(rates) > 1:
            for r in rates:
                for task in tasks:
                    value = draw.gauss(0.78 if r == rate else 0.74, 0.02)
                    rows.append(row(task, arm, value, split="selection", rate=r, **about))
        for seed in seeds:
            for i, task in enumerate(tasks):
                about["metric"] = {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
                about["majority"] = 0.0 if about["metric"] != "accuracy" else 0.5 + 0.02 * i
                own = min(0.99, draw.gauss(0.7 + 0.03 * i, 0.012))
                rows.append(row(task, arm, own, seed=seed, rate=rate, **about))
                for method, weight, options in merges:
                    lost = (0.32 if plain else 0.02 + 0.02 * place) * weight**2
                    lost += 0.25 * (1 - weight) ** 3
                    lost *= 1 if method == "task_arithmetic" else draw.uniform(0.5, 0.9)
                    value = max(about["majority"], own - lost + draw.gauss(0, 0.01))
                    rows.append(
                        row(task, arm, value, method=method, weight=weight, seed=seed, rate=rate,
                            options=options, **about)
                    )  # fmt: skip
    return rows


def fake_run(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The record beside the rows."""
    return {
        "name": "fake",
        "command": "orthomerge run recipes/fake.yaml --output runs/fake",
        "recipe": "name: fake\nmerges:\n  - method: ties\n    options: {density: 0.2}\n",
        "version": "0.1.0",
        "versions": {"orthomerge": "0.1.0", "torch": "2.8.0", "python": "3.11.9"},
        "machine": "x86_64, 2 threads, linux",
        "started": "2026-01-05T10:00:00+00:00",
        "base": {"id": "prajjwal1/bert-tiny", "source": "package", "sha256": "3f" * 32},
        "expected_rows": len(rows),
        "seconds": {"stats": 12.4, "init": 4.1, "train": 4210.0, "merge": 31.5, "eval": 120.2},
        "peak_memory": {"stats": 9.1e8, "train": 1.3e9, "eval": 1.1e9},
        "tasks": [
            {"name": t, "title": f"The {t} task", "kind": "classification", "metric": "accuracy",
             "licence": "CC-BY-4.0", "made": "Drawn from the published training split.",
             "majority": 0.5}
            for t in dict.fromkeys(r.task for r in rows)
        ],
    }  # fmt: skip


LAYERS = [
    f"encoder.layer.{i}.attention.self.{kind}" for i in range(3) for kind in ("query", "value")
]


def fake_analyses(folder: Path, rows: Sequence[ResultRow], layers: Sequence[str] = LAYERS) -> None:
    """The files beside the rows, for every arm, task and seed of them."""
    draw = random.Random(11)
    tasks = list(dict.fromkeys(r.task for r in rows))
    runs = dict.fromkeys((r.arm, r.seed, r.learning_rate) for r in rows if r.split == "test")
    first = {arm: seed for arm, seed, _ in reversed(runs)}

    def matrix() -> list[list[float | None]]:
        return [[1.0 if i == j else draw.uniform(0.1, 1.4) for j in tasks] for i in tasks]

    disturbances, curves, places = [], [], []
    for arm, seed, rate in runs:
        by_layer = {name: matrix() for name in layers}
        disturbances.append(
            Disturbance(f"d {arm} {seed}", arm, seed, rate, "token", tasks, matrix(), by_layer)
        )
        for task in tasks:
            losses = [[10.0 * s, 1.2 / s + draw.uniform(0, 0.1)] for s in range(1, 7)]
            curves.append(Curve(f"c {arm} {seed} {task}", arm, seed, task, rate, losses))
            for layer in layers if seed == first[arm] else ():
                parts = [draw.random() for _ in range(8)]
                parts = [p / sum(parts) for p in parts]
                key = f"p {arm} {task} {layer}"
                places.append(
                    BandShares(key, arm, seed, task, layer, parts, parts[::-1], [1.1, 0.4])
                )
    at = [1, 2, 4, 8, 16, 32]
    falling = [0.5 / p for p in at]
    spectra = [
        EnergySpectrum(f"s {t} {layer}", t, layer, 32, at, falling, [v / 2 for v in falling])
        for t in tasks
        for layer in layers
    ]
    for kind, records in (
        (Disturbance, disturbances), (Curve, curves), (BandShares, places),
        (EnergySpectrum, spectra),
    ):  # fmt: skip
        (folder / kind.FILE).write_text(to_lines(records), encoding="utf-8")
