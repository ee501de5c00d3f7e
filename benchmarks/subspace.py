"""Starts at the scale of an 8B model: our solvers against a full decomposition per module and task.

    python benchmarks/subspace.py            # about ten minutes on two cores

The baselines are what one writes first: `torch.linalg.svd(H_other)` or `torch.linalg.eigh(S_other)`
for every module and task. One call of each is timed (median of five) and multiplied by the number
of calls; ours is timed whole for one distinct input and all tasks, and multiplied by the number of
inputs. Features have a spectrum measured on MiniLM and stretched to the width.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

import torch
from torch import Tensor

from benchmarks.timing import bandwidth, gflops, median_seconds, save
from orthomerge.models.assets import resolve_model
from orthomerge.models.loading import load_backbone, load_tokenizer
from orthomerge.moments import Moment, RowMoment, SecondMoment, leave_one_out
from orthomerge.statistics import batches, collect_statistics
from orthomerge.subspace import get_solver
from orthomerge.tasks import get_task


def spectrum(dim: int) -> Tensor:
    """Energies of `dim` directions: those of MiniLM's middle layer on review texts, stretched.

    Between the measured 384 values the logarithm is interpolated, so that the share of quiet and
    loud directions, and the one direction that is dead in every layer, are real.
    """
    found = resolve_model("minilm")
    model, tokenizer = load_backbone(found.path_or_id), load_tokenizer(found.path_or_id)
    texts = [(r.text, r.pair) for r in get_task("sentiment").pools()["train"]][:200]
    layer = "encoder.layer.3.attention.self.query"
    stats = collect_statistics(model, batches(texts, tokenizer), [layer])
    measured = torch.linalg.eigvalsh(stats.second_moment(layer)).log()
    place = torch.linspace(0, len(measured) - 2, dim - 1, dtype=torch.float64)
    low = place.long().clamp_max(len(measured) - 3)
    rest = place - low
    values = measured[1:][low] * (1 - rest) + measured[1:][low + 1] * rest
    return torch.cat([measured[:1], values]).exp().float()


def features(rows: int, energies: Tensor, task: int) -> Tensor:
    """Gaussian rows with those energies along the axes, sixteen of them louder for this task."""
    generator = torch.Generator().manual_seed(1000 + task)
    scale = energies.sqrt()
    special = torch.randperm(len(energies), generator=generator)[:16]
    scale[special] = scale[special] * 2
    return torch.randn(rows, len(energies), generator=generator) * scale


def from_rows(layers: int, energies: Tensor, tasks: int, rows: int, rank: int) -> list[dict]:
    """Null-space starts of all tasks from few rows each."""
    dim = len(energies)
    data = [features(rows, energies, t) for t in range(tasks)]
    moments = [RowMoment.from_rows(h) for h in data]
    solver = get_solver("null_space")

    def ours(**options) -> list:
        return solver.for_all(moments, [rank] * tasks, **options)

    other = torch.cat(data[1:])
    svd = median_seconds(lambda: torch.linalg.svd(other, full_matrices=True), warm=False)
    modules = 2 * layers
    found = ours()
    worst = max(s.captured_other / s.total_other for s in found)
    result = []
    for name, options in (("drawn by seed", {}), ("of most own energy", {"tie": "own"})):
        seconds = median_seconds(lambda options=options: ours(**options)) * layers
        total = svd * modules * tasks
        # The Gram matrix, a Cholesky factor a task, and products of all rows with all features.
        products = 5 if name == "drawn by seed" else 4
        flops = 2 * (rows * tasks) ** 2 * dim + tasks * ((tasks - 1) * rows) ** 3 / 3
        flops += products * 2 * (rank * tasks) * (rows * tasks) * dim
        result.append(
            {
                "work": f"null_space {name}: q and v of {layers} layers, d={dim}, {tasks} tasks, "
                f"{rows} rows a task",
                "against": "torch.linalg.svd, full, float32, a module and task",
                "ours_s": round(seconds, 2),
                "theirs_s": round(total, 1),
                "ratio": round(total / seconds, 1),
                "wanted": 50,
                "captured": worst,
                "gflop": round(flops * layers / 1e9, 1),
            }
        )
    return result


def from_moments(layers: int, energies: Tensor, tasks: int, rank: int) -> list[dict]:
    """`min_eigen` of all tasks from full second moments, exact."""
    dim = len(energies)
    moments: list[Moment] = []
    for t in range(tasks):
        h = features(2 * dim, energies, t).double()
        moments.append(SecondMoment.from_matrix(h.T @ h / len(h), len(h)))
    solver = get_solver("min_eigen")

    def ours() -> list:
        return solver.for_all(moments, [rank] * tasks)

    found = ours()
    other = leave_one_out(moments)[0].matrix
    values = torch.linalg.eigvalsh(other)
    excess = found[0].captured_other / float(values[:rank].sum()) - 1.0
    eigh = median_seconds(lambda: torch.linalg.eigh(other), warm=False)
    seconds = median_seconds(ours) * layers
    total = eigh * 2 * layers * tasks
    solves = [int(s.cost.how.split()[1]) if "solves" in s.cost.how else 0 for s in found]
    assert min(solves) > 0, "the fast path was not taken: a full decomposition was timed"
    flops = tasks * dim**3 / 3 + sum(solves) * 4 * dim**2 * (rank + 8)
    return [
        {
            "work": f"min_eigen: q and v of {layers} layers, d={dim}, {tasks} tasks, full moments",
            "against": "torch.linalg.eigh, float64, a module and task",
            "ours_s": round(seconds, 1),
            "theirs_s": round(total, 1),
            "ratio": round(total / seconds, 1),
            "wanted": 20,
            "excess_captured": excess,
            "condition": float(values[-1] / values[0]),
            "solves": max(solves),
            "gflop": round(flops * layers / 1e9, 1),
        }
    ]


def main() -> None:
    """Run both and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    a = parser.parse_args()
    energies = spectrum(a.dim)
    table = from_rows(a.layers, energies, a.tasks, a.rows, a.rank)
    table += from_moments(a.layers, energies, a.tasks, a.rank)
    roof = gflops()
    for row in table:
        row["of_roof"] = round(row["gflop"] / row["ours_s"] / roof, 2)
    save("subspace", table, roof_gflops=round(roof, 1), bandwidth_gb_s=round(bandwidth(), 1))


if __name__ == "__main__":
    main()
