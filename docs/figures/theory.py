"""The pictures of docs/theory.md, from MiniLM's layer inputs on the eight offline tasks.

python -m docs.figures.theory --measure    # a minute: the numbers again, into theory.json
python -m docs.figures.theory              # the pictures from the numbers
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
NUMBERS = HERE / "theory.json"
RANK = 8
SOLVERS = {
    "random rows": ("random_orthonormal", {}),
    "min_eigen (the paper)": ("min_eigen", {}),
    "contrastive": ("contrastive", {}),
}
TRAP = {
    "last rows of a full SVD": ("null_space_lapack", {}),
    "a seeded draw": ("null_space", {"tie": "random"}),
    "most own energy": ("null_space", {"tie": "own"}),
}
COLOURS = {
    "random rows": "#5f6b7a",
    "min_eigen (the paper)": "#c05621",
    "contrastive": "#1a5fb4",
}


def measure() -> dict[str, Any]:
    """Everything the pictures show, as plain numbers."""
    from benchmarks.starts import statistics

    return {**_spectrum(statistics()), "trap": _trap(statistics("task_mean"))}


def _spectrum(stats: list[Any]) -> dict[str, Any]:
    """The eigenvalues of one layer's others; every start's share of both energies."""
    from orthomerge.moments import leave_one_out
    from orthomerge.subspace import get_solver

    leads = list(stats[0].moments)
    lead = leads[len(leads) // 2]
    other = leave_one_out([s.moments[lead] for s in stats])[0]
    values = torch.linalg.eigvalsh(other.matrix).flip(0).clamp_min(0.0)
    seen: dict[str, list[list[float]]] = {}
    for title, (name, options) in SOLVERS.items():
        for layer in leads:
            moments = [s.moments[layer] for s in stats]
            for task, (o, m) in enumerate(zip(leave_one_out(moments), moments, strict=True)):
                found = get_solver(name)(o, RANK, own=m, seed=task, **options)
                share = [found.captured_other / o.trace, found.captured_own / m.trace]
                seen.setdefault(title, []).append([float(f"{x:.4g}") for x in share])
    shares = (values / values.sum()).tolist()
    return {"layer": lead, "shares": [float(f"{x:.4g}") for x in shares], "seen": seen}


def _trap(stats: list[Any]) -> dict[str, Any]:
    """Means of tasks leave a huge null space: how alike are the rows that eight tasks get in it?"""
    from orthomerge.moments import leave_one_out
    from orthomerge.subspace import get_solver

    leads = list(stats[0].moments)
    moments = [s.moments[leads[len(leads) // 2]] for s in stats]
    found: dict[str, Any] = {}
    for title, (name, options) in TRAP.items():
        rows = [
            get_solver(name)(o, RANK, own=m, seed=t, **options).basis
            for t, (o, m) in enumerate(zip(leave_one_out(moments), moments, strict=True))
        ]
        alike = [
            [round(float(torch.linalg.svdvals(a @ b.T).mean()), 4) for b in rows] for a in rows
        ]
        pairs = [alike[i][j] for i, j in itertools.combinations(range(len(rows)), 2)]
        found[title] = {"alike": alike, "mean": round(sum(pairs) / len(pairs), 3)}
    return found


def draw(found: dict[str, Any]) -> None:
    """The three pictures, as SVG beside this file; each names the numbers it was drawn from."""
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "orthomerge", "svg.fonttype": "none", "font.size": 10})
    for name, paint in (("spectrum", _draw_spectrum), ("seen", _draw_seen), ("trap", _draw_trap)):
        figure = paint(plt, found)
        metadata = {"Date": None, "Description": fingerprint_of(found)}
        figure.savefig(HERE / f"{name}.svg", metadata=metadata, bbox_inches="tight")
        plt.close(figure)


def fingerprint_of(found: dict[str, Any]) -> str:
    """A hash of the numbers, by which a test tells a picture that is out of date."""
    from orthomerge.io.files import fingerprint

    return fingerprint(found)


def _draw_spectrum(plt: Any, found: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.2))
    shares = found["shares"]
    axis.semilogy(range(1, len(shares) + 1), [max(s, 1e-9) for s in shares], color="#1a5fb4")
    axis.axhline(1 / len(shares), color="#5f6b7a", linestyle="--", linewidth=1)
    axis.text(len(shares), 1.25 / len(shares), "all alike", ha="right", color="#5f6b7a")
    half = next(i for i in range(len(shares)) if sum(shares[: i + 1]) >= 0.9) + 1
    axis.axvspan(1, half, color="#c05621", alpha=0.15)
    axis.text(half + 4, shares[0] / 3, f"{half} directions hold 90 %", color="#c05621")
    axis.axvspan(len(shares) - RANK, len(shares), color="#1a5fb4", alpha=0.25)
    axis.text(len(shares) - RANK - 4, 3e-7, "room for a rank of 8", ha="right", color="#1a5fb4")
    axis.set(
        xlabel="direction of the layer's input, highest energy first", ylabel="share of energy"
    )
    return figure


def _draw_seen(plt: Any, found: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for title, points in found["seen"].items():
        other, own = zip(*points, strict=True)
        axis.loglog(other, own, ".", color=COLOURS[title], label=title, alpha=0.8)
    low, high = 1e-5, 1.0
    axis.plot([low, high], [low, high], color="#5f6b7a", linewidth=1, linestyle="--")
    axis.text(1.5e-5, 4e-3, "above the line:\nlouder for its own task", color="#5f6b7a")
    axis.set(xlabel="share of the others' energy that A sees", xlim=(low, high))
    axis.set(ylabel="share of its own task's", ylim=(low, high))
    axis.legend(loc="lower right")
    return figure


def _draw_trap(plt: Any, found: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3))
    for axis, (title, of) in zip(axes, found["trap"].items(), strict=True):
        shown = axis.imshow(of["alike"], vmin=0, vmax=1, cmap="Blues")
        axis.set(title=f"{title}: {of['mean']:.2f}", xlabel="task", xticks=[], yticks=[])
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("task")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="mean cosine of their rows")
    return figure


if __name__ == "__main__":
    if "--measure" in sys.argv:
        NUMBERS.write_text(json.dumps(measure()) + "\n", encoding="utf-8")
    draw(json.loads(NUMBERS.read_text(encoding="utf-8")))
