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
from orthomerge.errors import MergeError, unknown_name
from orthomerge.merging import MergeConfig, get_method
from orthomerge.merging.parts.inner import known_options
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
    def largest_shifts(self) -> list[tuple[str, float]]:
        """The layers by what they add to the mean shift of the sum at weight 1, largest first."""
        if self.plain is None:
            return []
        terms = self.plain.untuned.layers
        found = [(name, float(shares.mean())) for name, shares in terms.items()]
        return sorted(found, key=lambda item: -item[1])

    loudest = largest_shifts  # the name of version 0.1, for one release

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
            "loudest_layers": [{"layer": n, "shift": v} for n, v in self.largest_shifts],
            "advice": [a._asdict() for a in self.advice],
        }


def diagnose(
    adapters: Sequence[str | Path | Adapter],
    statistics: Sequence[str | Path | Statistics] | None = None,
    *,
    methods: Sequence[str | MergeConfig] = METHODS,
    options: Mapping[str, Any] | None = None,
    base: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Compare adapters before merging them; with statistics, predict what a merge does.

    Args:
        adapters: PEFT folders, or adapters read before.
        statistics: one per task, in the order of the adapters; without them only the factors are
            compared.
        methods: compared with the plain sum, each at the weight of least predicted shift. Names,
            or what is asked of a merge whose weights are not looked at.
        options: of the methods that are named; each takes the ones it has.
        base: the base model, where the adapters name none or call one model by several names.
        progress: called with the trials done and their number.

    Raises:
        AdapterError: unreadable adapters, or adapters of different base models.
        StatisticsError: not one statistics an adapter, or a layer without statistics.
        MergeError, UnknownNameError: a method that does not exist or cannot merge these, or an
            option that none of the methods has.
    """
    asked = _asked(methods, options or {})
    read = read_all(adapters, base=base)
    compared = overlap(read)
    if statistics is None:
        return Diagnosis(compared, notes(compared))
    stats = matched(statistics, read)
    found = couplings(read, stats)
    plain = best_weight_of_sum(found)
    tried: dict[str, BestWeight] = {}
    for place, (name, config) in enumerate(asked.items()):

        def report(done: int, of: int, place: int = place) -> None:
            if progress:
                progress(place * of + done, len(asked) * of)

        tried[name] = best_weight(read, stats, config, progress=report)
    return Diagnosis(
        compared, notes(compared), found, interference_of(found), plain, tried,
        advise(found, plain, tried),
    )  # fmt: skip


def _asked(
    methods: Sequence[str | MergeConfig], options: Mapping[str, Any]
) -> dict[str, MergeConfig]:
    """Every merge by what the diagnosis calls it: its method, with its options where two share one.

    Raises:
        MergeError: an option that none of the named methods has.
    """
    named = [get_method(m) for m in methods if isinstance(m, str)]
    taken = {m.name: known_options(m, options) for m in named}
    for option in options:
        if not any(option in found for found in taken.values()):
            valid = {name: None for m in named for name in m.options}
            raise unknown_name(
                "option", option, valid, where=f"the methods {', '.join(taken) or '(none)'}",
                error=MergeError,
            )  # fmt: skip
    configs = [
        m if isinstance(m, MergeConfig) else MergeConfig(m, options=taken[m]) for m in methods
    ]
    names = [c.method for c in configs]
    return {
        c.method if names.count(c.method) == 1 else f"{c.method} {dict(c.options)}": c
        for c in configs
    }


def _plain(best: BestWeight) -> dict[str, Any]:
    return {
        "best_weight": best.weight,
        "at_best": {**_lists(best.shift), "mean": best.shift.mean},
        "at_1": {**_lists(best.untuned), "mean": best.untuned.mean},
    }


def _lists(shift: Any) -> dict[str, list[float]]:
    return {name: getattr(shift, name).tolist() for name in ("kept", "beside", "total")}
