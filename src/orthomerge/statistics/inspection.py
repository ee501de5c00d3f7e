"""What a statistics file holds and what it reveals to others, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from orthomerge import linalg
from orthomerge.moments import MeanMoment, Moment
from orthomerge.statistics.file import Statistics
from orthomerge.statistics.meta import StatisticsMeta


class Spectrum(NamedTuple):
    """How the energy of a moment is spread over directions.

    `top_share` is the part along the strongest direction, `effective_rank` the exponential of the
    entropy of the shares, `directions_90` and `directions_99` how many directions hold that much,
    `smallest` the weakest eigenvalue relative to the mean one.
    """

    trace: float
    top_share: float
    effective_rank: float
    directions_90: int
    directions_99: int
    smallest: float


class InputSummary(NamedTuple):
    """One distinct layer input: who reads it, how it is held, and its spectrum.

    `kept` is the number of rows of the factor, None for a full moment; `slack` is None where a
    sample bounds nothing.
    """

    lead: str
    layers: list[str]
    width: int
    kind: str
    rows: int
    kept: int | None
    exact: bool
    slack: float | None
    bytes: int
    spectrum: Spectrum


def spectrum(moment: Moment) -> Spectrum:
    """The spectrum of a moment: O(m² d_in) for a factor of m rows, O(d_in³) for a matrix.

    Raises:
        StatisticsError: no row was seen.
    """
    rows = moment.factor
    held = moment.matrix if rows is None else (rows @ rows.T if len(rows) < moment.dim else None)
    if held is None:
        held = moment.matrix
    values = linalg.eigvalsh(held).flip(0).clamp_min(0.0)
    total = float(values.sum())
    if not total > 0:
        return Spectrum(0.0, 0.0, 0.0, 0, 0, 0.0)
    shares = values / total
    summed = shares.cumsum(0)
    entropy = float(cast(Tensor, torch.special.entr(shares)).sum())
    last = float(values[-1]) if len(values) == moment.dim else 0.0
    return Spectrum(
        trace=total,
        top_share=float(shares[0]),
        effective_rank=float(torch.tensor(entropy).exp()),
        directions_90=int((summed < 0.9).sum()) + 1,
        directions_99=int((summed < 0.99).sum()) + 1,
        smallest=last * moment.dim / total,
    )


def summarize(
    statistics: Statistics, progress: Callable[[], None] | None = None
) -> list[InputSummary]:
    """Every distinct input, one at a time, so that a file read lazily is never in memory whole.

    Raises:
        StatisticsError: an entry that was altered.
    """
    found: list[InputSummary] = []
    for lead in statistics.moments:
        moment = statistics.moments[lead]
        factor = moment.factor
        held = moment.dim * (moment.dim + 1) // 2 if factor is None else factor.numel()
        found.append(
            InputSummary(
                lead=lead,
                layers=[layer for layer, owner in statistics.layers.items() if owner == lead],
                width=moment.dim,
                kind=moment.kind,
                rows=moment.tokens if isinstance(moment, MeanMoment) else moment.count,
                kept=None if factor is None else len(factor),
                exact=moment.exact,
                slack=moment.slack,
                bytes=8 * held,
                spectrum=spectrum(moment),
            )
        )
        if progress is not None:
            progress()
    return found


def layer_label(layers: Sequence[str]) -> str:
    """Layers in one short name: `encoder.layer.0.attention.self.{query,key,value}`."""
    if len(layers) == 1:
        return layers[0]
    if len(layers) > 4:
        return f"{layers[0]} and {len(layers) - 1} more"
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while len({part[shared] for part in parts}) == 1:
        shared += 1
    ends = ",".join(".".join(part[shared:]) for part in parts)
    return ".".join([*parts[0][:shared], f"{{{ends}}}"])


def disclosure(meta: StatisticsMeta, inputs: Sequence[InputSummary]) -> list[str]:
    """What a file gives away about the data behind it, in plain sentences with its figures."""
    rows = max(item.rows for item in inputs)
    said = ["It holds no text; the numbers of samples and rows are given exactly."]
    if meta.form == "text":
        said.append(
            "Rows are tokens of prompts and of the task's answers taken in turn; no label is in it."
        )
    if meta.granularity == "token":
        said.append(
            f"Every one of {rows:,} real tokens is a row (granularity 'token'); at layers close to "
            "the embeddings, whether a given word occurs can be tested."
        )
    elif meta.granularity == "sample":
        said.append(f"Every text is one row, its mean over tokens ({rows:,} rows, 'sample').")
    else:
        said.append(
            f"One vector an input, the mean over {rows:,} tokens ('task_mean'): "
            + ("that mean is given with noise." if meta.noise else "that mean is given exactly.")
        )
    if meta.directions is None and meta.granularity != "task_mean":
        said += _about_rows("token" if meta.granularity == "token" else "text", inputs)
    elif meta.directions is not None:
        blurred = f"with noise of size {meta.noise:g} times the mean energy of a direction"
        said.append(
            f"Only the top {meta.directions} directions of every input are in it, "
            f"{blurred if meta.noise else 'without noise, so these are given exactly'}."
        )
    said.append(
        "This is not differential privacy: rows are not clipped, so one text can change the "
        "numbers by any amount, and no budget is kept over what is published."
    )
    return said


def _about_rows(what: str, inputs: Sequence[InputSummary]) -> list[str]:
    """How much a single row stands out: its mean leverage, dimensions / rows."""
    # Of a sample that was drawn, only the rows that stayed are in the file.
    held = [i.kept if i.kind == "rows" and not i.exact and i.kept else i.rows for i in inputs]
    leverage = [min(i.width, rows) / rows for i, rows in zip(inputs, held, strict=True)]
    said = [
        f"A row's mean leverage (dimensions by rows) is {min(leverage):.2g} to {max(leverage):.2g} "
        "over the inputs: near 0 a row blends in with the others, at 1 it stands alone."
    ]
    tight = [
        (rows, i.width)
        for i, rows in zip(inputs, held, strict=True)
        if rows <= i.width and (i.exact or i.kind == "rows")
    ]
    if tight:
        rows, width = min(tight)
        said.append(
            f"{len(tight)} of {len(inputs)} inputs hold no more rows than they are wide (as "
            f"{rows:,} rows of width {width:,}): the span of the rows is exactly determined, so "
            f"whether a given {what} was among them can be tested almost with certainty; collect "
            "more samples, or publish a part with noise."
        )
    if any(rows == 1 for rows in held):
        said.append("An input saw a single row: that row itself is in the file, up to its sign.")
    return said
