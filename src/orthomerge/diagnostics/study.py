"""What each kind of advice rests on: how well its figure predicted the measured loss of accuracy.

The figures are written by `python -m benchmarks.evidence` from the study's lines. Advice whose
predictor does not beat the plain cosine of the updates is not given.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Evidence(NamedTuple):
    """Spearman's rho of prediction and measured loss, with its 95 % interval.

    `cosine` is that of the plain cosine similarity over the same points; `gain` the interval of
    the difference.
    """

    rho: float
    interval: tuple[float, float]
    cosine: float
    gain: tuple[float, float]
    points: int

    @property
    def holds(self) -> bool:
        """Whether the prediction is better than none and than the plain cosine."""
        return self.interval[0] > 0 and self.gain[0] > 0

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"rank correlation with measured loss {self.rho:.2f} [{low:.2f}, {high:.2f}] over "
            f"{self.points} points; plain cosine {self.cosine:.2f}"
        )


@cache
def evidence(kind: str) -> Evidence | None:
    """The evidence behind a kind of advice: "merges", "leave_out" or "layers".

    None for a kind that the study did not measure.
    """
    source = files("orthomerge.diagnostics").joinpath("study.json")
    found = json.loads(source.read_text(encoding="utf-8")).get(kind)
    if found is None:
        return None
    whole = found["all"]
    return Evidence(
        whole["rho"], tuple(whole["interval"]), whole["cosine"], tuple(whole["gain_interval"]),
        whole["points"],
    )  # fmt: skip


def borne_out(kind: str) -> bool:
    """Whether the study bears a kind of advice out."""
    found = evidence(kind)
    return found is not None and found.holds
