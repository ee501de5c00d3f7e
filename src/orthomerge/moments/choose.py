"""Which representation an input gets: by what it costs beside the layer itself, and by memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from orthomerge.errors import StatisticsError, unknown_name
from orthomerge.moments.full import SecondMoment
from orthomerge.moments.moment import Moment
from orthomerge.moments.rows import DEFAULT_ROWS, RowMoment
from orthomerge.moments.sketch import DEFAULT_SIZE, SketchMoment

KINDS = ("auto", "full", "rows", "sketch")
DEFAULT_BUDGET = 1 << 30
"""Bytes that the moments of one task may take while they are collected."""


class Representation(NamedTuple):
    """How to hold moments: a `kind` of `KINDS`, and what bounds each.

    `rows` the most rows of a row form, `size` the directions of a sketch, `budget` the bytes for
    all inputs of one task together, by which `auto` chooses.
    """

    kind: str = "auto"
    rows: int = DEFAULT_ROWS
    size: int = DEFAULT_SIZE
    budget: int = DEFAULT_BUDGET

    def check(self) -> Representation:
        """Itself.

        Raises:
            StatisticsError: an unknown kind, or a bound below one.
        """
        if self.kind not in KINDS:
            raise unknown_name("representation", self.kind, KINDS, error=StatisticsError)
        if min(self.rows, self.size, self.budget) < 1:
            raise StatisticsError("rows, size and budget of a representation are at least 1.")
        return self

    def new(self, kind: str, dim: int) -> Moment:
        """An empty moment of width `dim`."""
        if kind == "full":
            return SecondMoment(dim)
        return RowMoment(dim, self.rows) if kind == "rows" else SketchMoment(dim, self.size)


def choose(
    inputs: Mapping[str, tuple[int, int]], representation: Representation | None = None
) -> dict[str, str]:
    """The kind for each input; `inputs` gives its width and the outputs of all layers reading it.

    A full moment costs d_in multiply-adds an entry of a row, the layers that read the row cost
    Σ d_out: `auto` takes the full one while it costs no more than they do and all of them fit
    into the budget, else rows while they fit, else a sketch.
    """
    wanted = (representation or Representation()).check()
    if wanted.kind != "auto":
        return dict.fromkeys(inputs, wanted.kind)
    full = {name: 8 * width**2 for name, (width, outputs) in inputs.items() if width <= outputs}
    if sum(full.values()) > wanted.budget:
        full = {}
    rows = sum(4 * wanted.rows * width for name, (width, _) in inputs.items() if name not in full)
    rest = "rows" if rows <= wanted.budget - sum(full.values()) else "sketch"
    return {name: "full" if name in full else rest for name in inputs}
