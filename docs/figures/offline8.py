"""README's picture, from the kept rows of the eight offline tasks: score against the merge weight.

python -m docs.figures.offline8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "results" / "offline8" / "results.jsonl"
PICTURE = Path(__file__).with_suffix(".svg")
# Colours that stay apart for the colour-blind, and a mark each.
ARMS = {
    "default": ("default (PEFT's start)", "#1a5fb4", "o"),
    "osrm": ("osrm (the paper's start)", "#c05621", "s"),
    "osrm-frozen": ("osrm-frozen (A held)", "#00796b", "D"),
    "osrm-project": ("osrm-project (A projected)", "#9b4f96", "^"),
    "contrastive-project": ("contrastive-project (ours, projected too)", "#7a5c00", "v"),
}


def found() -> dict[str, Any]:
    """For every arm: alone, and at every weight of the sum, mean and spread × 100."""
    from orthomerge.io.rows import read_rows
    from orthomerge.report import summarize

    summary = summarize(read_rows(ROWS))
    arms = {arm.name: arm for arm in summary.arms}
    columns = [c for c in summary.columns if c.label == "single" or c.label.startswith("sum ×")]
    return {
        name: {
            column.label: [round(100 * score.mean, 2), round(100 * (score.spread or 0.0), 2)]
            for column in columns
            if (score := summary.cell(arms[name], column).score)
        }
        for name in ARMS
    }


def draw(scores: dict[str, Any]) -> None:
    """The picture beside this file; it names the numbers it was drawn from."""
    from matplotlib import pyplot as plt

    from orthomerge.io.files import fingerprint

    plt.rcParams.update({"svg.hashsalt": "orthomerge", "svg.fonttype": "none", "font.size": 10})
    figure, (alone, merged) = plt.subplots(
        1, 2, figsize=(8, 3.9), sharey=True, width_ratios=(1, 4), layout="constrained"
    )
    for place, (name, (title, colour, mark)) in enumerate(ARMS.items()):
        of = dict(scores[name])
        style: dict[str, Any] = {"color": colour, "marker": mark, "capsize": 2, "markersize": 5}
        mean, spread = of.pop("single")
        alone.errorbar([place], [mean], [spread], **style)
        weights = [float(label.split("× ")[1]) for label in of]
        means, spreads = zip(*of.values(), strict=True)
        shifted = [w + 0.006 * (place - 2) for w in weights]
        merged.errorbar(shifted, means, spreads, label=title, elinewidth=0.8, **style)
    alone.set(xlabel="alone", xticks=[], xlim=(-1, len(ARMS)), ylabel="mean score × 100")
    merged.set(xlabel="all eight summed: weight of every adapter", xticks=weights)
    for axis in (alone, merged):
        axis.grid(axis="y", color="#d8dde3", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    metadata = {"Date": None, "Description": fingerprint(scores)}
    figure.savefig(PICTURE, metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":
    draw(found())
