"""The whole diagnosis of some adapters: what the factors show, and what statistics predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orthomerge.adapters import Adapter
from orthomerge.diagnostics.advice import Advice, advise, notes
from orthomerge.diagnostics.couplings import Couplings, couplings, matched, read_all
from orthomerge.diagnostics.interference import Interference, interference_of
from orthomerge.diagnostics.overlap import Overlap, overlap
from orthomerge.diagnostics.weights import BestWeight, best_weight, best_weight_of_sum
from orthomerge.merging import get_method
from orthomerge.statistics import Statistics

METHODS = ("tsv_m", "osrm_aware")
"""Compared with the plain sum unless others are named: both stay factors, whatever the width."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found. Without statistics there is only `overlap` and what it shows.

    `plain` is the sum of the adapters at its best common weight, `methods` other methods at
    theirs; each holds the predicted shift of every task there and at weight 1.
    """

    overlap: Overlap
    notes: list[str]
    couplings: Couplings | None = None
    interference: Interference | None = None
    plain: BestWeight | None = None
    methods: Mapping[str, BestWeight] = field(default_factory=dict[str, BestWeight])
    advice: list[Advice] = field(default_factory=list[Advice])

    @property
    def loudest(self) -> list[tuple[str, float]]:
        """The layers by what they add to the mean shift of the sum at weight 1, largest first."""
        if self.plain is None:
            return []
        terms = self.plain.untuned.layers
        found = [(name, float(shares.mean())) for name, shares in terms.items()]
        return sorted(found, key=lambda item: -item[1])

    def record(self) -> dict[str, Any]:
        """Everything as JSON."""
        o = self.overlap
        squares = ("cosine", "row_space", "column_space", "sign_conflict", "start_alike")
        found: dict[str, Any] = {
            "adapters": o.names,
            "overlap": {name: getattr(o, name).tolist() for name in squares},
            "norms": o.norms.tolist(),
            "effective_rank": o.effective_rank.tolist(),
            "shared_starts": [[o.names[i], o.names[j]] for i, j in o.shared_starts],
            "notes": self.notes,
        }
        if self.interference is None or self.plain is None:
            return found
        return found | {
            "interference": self.interference.matrix.tolist(),
            "layers": {n: m.tolist() for n, m in self.interference.layers.items()},
            "shift": {
                "task_arithmetic": _plain(self.plain),
                **{name: _plain(best) for name, best in self.methods.items()},
            },
            "loudest_layers": [{"layer": n, "shift": v} for n, v in self.loudest],
            "advice": [a._asdict() for a in self.advice],
        }


def diagnose(
    adapters: Sequence[str | Path | Adapter],
    statistics: Sequence[str | Path | Statistics] | None = None,
    *,
    methods: Sequence[str] = METHODS,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Compare adapters before merging them; with statistics, predict what a merge does.

    Args:
        adapters: PEFT folders, or adapters read before.
        statistics: one a task, in the order of the adapters; without them only the factors are
            compared.
        methods: compared with the plain sum, each at the weight of least predicted shift.
        options: of the methods named; each takes the ones it knows by name.
        progress: called with the trials done and their number.

    Raises:
        AdapterError: unreadable adapters, or adapters of different base models.
        StatisticsError: not one statistics an adapter, or a layer without statistics.
        MergeError, UnknownNameError: a method that does not exist or cannot merge these.
    """
    read = read_all(adapters)
    compared = overlap(read)
    if statistics is None:
        return Diagnosis(compared, notes(compared))
    stats = matched(statistics, read)
    found = couplings(read, stats)
    plain = best_weight_of_sum(found)
    tried: dict[str, BestWeight] = {}
    for place, name in enumerate(methods):

        def told(done: int, of: int, place: int = place) -> None:
            if progress:
                progress(place * of + done, len(methods) * of)

        tried[name] = best_weight(
            read, stats, method=name, options=_known(name, options or {}), progress=told
        )
    return Diagnosis(
        compared, notes(compared), found, interference_of(found), plain, tried,
        advise(found, plain, tried),
    )  # fmt: skip


def _known(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    valid = get_method(name).options
    return {k: v for k, v in options.items() if k in valid or f"{k}_" in valid}


def _plain(best: BestWeight) -> dict[str, Any]:
    return {
        "best_weight": best.weight,
        "at_best": {**_lists(best.shift), "mean": best.shift.mean},
        "at_1": {**_lists(best.untuned), "mean": best.untuned.mean},
    }


def _lists(shift: Any) -> dict[str, list[float]]:
    return {name: getattr(shift, name).tolist() for name in ("kept", "beside", "total")}
