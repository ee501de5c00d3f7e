"""The penalty's picture, from kept rows: single-task score against merged score, one point per arm.

python -m docs.figures.penalty
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Runs with the same tasks and rows, and what is added to the names of their arms.
RUNS = {"offline8": "", "offline8-penalty": "", "offline8-penalty-no-dropout": ", no dropout"}
PICTURE = Path(__file__).with_suffix(".svg")
UNTUNED = "sum × 1"
# Title, colour and mark; any other arm of the penalty's run is drawn in grey under its own name.
ARMS = {
    "default": ("default (PEFT's start)", "#1a5fb4", "o"),
    "osrm": ("osrm (start alone)", "#c05621", "s"),
    "osrm-frozen": ("osrm-frozen (A held)", "#00796b", "D"),
    "osrm-project": ("osrm-project (A projected)", "#9b4f96", "^"),
    "contrastive-project": ("contrastive-project", "#7a5c00", "v"),
    "penalty": ("penalty (λ = 10)", "#b00020", "*"),
    "isotropic": ("isotropic (control)", "#3d4a57", "X"),
    "default, no dropout": ("default, no dropout", "#7fb2ea", "o"),
    "penalty, no dropout": ("penalty, no dropout", "#ff6b81", "*"),
    "isotropic, no dropout": ("isotropic, no dropout", "#98a4b0", "X"),
}
OTHER = ("#8a94a0", "oPdhp<>")


def found() -> dict[str, Any]:
    """For every arm: seeds, and mean and spread × 100 alone, at weight 1 and at the best weight."""
    points: dict[str, Any] = {}
    for run, suffix in RUNS.items():
        points |= _of_run(run, suffix)
    return points


def _of_run(run: str, suffix: str) -> dict[str, Any]:
    from orthomerge.io.rows import read_rows
    from orthomerge.report import summarize

    summary = summarize(read_rows(ROOT / "results" / run / "results.jsonl"))
    columns = [c for c in summary.columns if c.label == "single" or c.label.startswith("sum ×")]
    points: dict[str, Any] = {}
    for arm in summary.arms:
        scores = {c.label: s for c in columns if (s := summary.cell(arm, c).score)}
        alone = scores.pop("single", None)
        if alone is None or UNTUNED not in scores or (run == "offline8" and arm.name not in ARMS):
            continue
        # Some weights were tried in some seeds only.
        whole = {label: s for label, s in scores.items() if s.seeds == alone.seeds}
        best = max(whole, key=lambda label: whole[label].mean)
        points[arm.name + suffix] = {
            "seeds": len(alone.seeds),
            "single": _numbers(alone),
            "untuned": _numbers(scores[UNTUNED]),
            "best": [best, *_numbers(scores[best])],
        }
    return points


def _numbers(score: Any) -> list[float]:
    return [round(100 * score.mean, 2), round(100 * (score.spread or 0.0), 2)]


def draw(points: dict[str, Any]) -> None:
    """The picture beside this file; it names the numbers it was drawn from."""
    from matplotlib import pyplot as plt

    from orthomerge.io.files import fingerprint

    plt.rcParams.update({"svg.hashsalt": "orthomerge", "svg.fonttype": "none", "font.size": 10})
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.6), sharey=True, layout="constrained")
    others = [name for name in points if name not in ARMS]
    for axis, column in zip(panels, ("untuned", "best"), strict=True):
        for name, of in points.items():
            grey = (f"{name} (one seed)" if of["seeds"] == 1 else name, OTHER[0])
            title, colour, mark = ARMS.get(name) or (*grey, OTHER[1][others.index(name)])
            (x, dx), (y, dy) = of["single"], of[column][-2:]
            axis.errorbar([x], [y], [dy], [dx], color=colour, marker=mark, label=title, capsize=2,
                          markersize=9 if mark == "*" else 6, elinewidth=0.8,
                          linestyle="none")  # fmt: skip
        # Above this line a merge would be better than its parts.
        axis.plot([58, 80], [58, 80], color="#9aa3ad", linestyle="--", linewidth=0.8)
        axis.set(xlabel="alone: mean score × 100", xlim=(58, 80), ylim=(37, 80))
        axis.grid(color="#d8dde3", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="merged: mean score × 100", title="summed at weight 1, untuned")
    panels[1].set(title="summed at each arm's best weight")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)  # fmt: skip
    figure.savefig(PICTURE, metadata={"Date": None, "Description": fingerprint(points)})
    plt.close(figure)


if __name__ == "__main__":
    draw(found())
