"""What is asked of a merge: one frozen configuration, checked once, carried by all that merges."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from orthomerge.errors import AdapterError, MergeError, unknown_name
from orthomerge.merging.parts.inner import check_options, parameter_of
from orthomerge.merging.parts.options import check_rank
from orthomerge.merging.registry import DefaultWeight, get_method

HEADS = ("keep", "average", "refuse")
"""What can become of task heads and other `modules_to_save`."""
SUM, FULL, AUTO = "sum", "full", "auto"
"""The ranks that are no number: the sum of the adapters' ranks, nothing cut, by kept energy."""
ENERGY = 0.99
"""The part of an update's squared norm that the rank "auto" keeps unless another is asked for."""

Weights = Sequence[float] | float
"""One weight per adapter, or a single one for all of them."""
LayerWeights = Mapping[str, Weights]
"""Weights of the layers whose name a regular expression matches (`re.search`), first match."""


@dataclass(frozen=True)
class MergeConfig:
    """All that a user asks of a merge; make one where the same merge is wanted in several places.

    It is checked when it is made, so that whatever takes one need not check it again. What depends
    on the adapters (how many weights, which layers there are) is checked when they are merged.

    Args:
        method: a name of `orthomerge list methods`.
        weights: one per adapter, one for all, or None for the method's default, which depends on
            the number of adapters (`DefaultWeight`).
        layer_weights: other weights for layers that a regular expression finds; the first decides.
        rank: a number truncates every layer to this rank (best approximation). "sum" truncates only
            dense updates, to the sum of the adapters' ranks in that layer (what is lost is within a
            part in a thousand of the least). "full" keeps what the method gives. "auto" gives every
            layer the least rank that keeps `energy`. None is "auto" where an `energy` is given,
            else "sum" where an adapter is the result, else "full".
        energy: the part of each layer's squared Frobenius norm that the rank "auto" keeps, 0.99 by
            default; a relative error of at most e is the energy 1 - e².
        seed: for methods that draw at random.
        options: of the method; those called lambda in the papers are `lambda_` or "lambda". A
            method that works through another one (`core_space`, `pico`) passes on the options it
            does not have: `{"inner": "ties", "density": 0.5}`.
        heads: what becomes of task heads and other `modules_to_save`: "keep" them per task under
            `heads/`, "average" them into the adapter (the plain mean), or "refuse" them.
        base: the base model's folder or id, for DoRA and where adapters call it by several names.

    Raises:
        UnknownNameError: no such method.
        MergeError: weights that are not finite, an option that the method does not have, a rank
            that is none, an energy that is none or beside another rank, or layer weights under
            something that is no regular expression.
        AdapterError: no such treatment of heads.
    """

    method: str = "linear"
    weights: Weights | None = None
    layer_weights: LayerWeights = field(default_factory=dict[str, Weights])
    rank: int | str | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    heads: str = "keep"
    base: str | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        method, options = get_method(self.method), dict(self.options)
        if "rank" in options and "rank" in method.options:  # the merge's rank is this option
            if self.rank is not None:
                raise MergeError(f"the rank of '{method.name}' is given twice: give it once.")
            self._set(rank=options.pop("rank"))
        self._settle_rank()
        for name in options:
            if name in FIELDS and name not in method.options and not method.open_options:
                raise MergeError(
                    f"'{name}' is no option of the method '{method.name}': give it to the merge "
                    "itself ('orthomerge merge --help')."
                )
        check_options(method, options)
        if self.heads not in HEADS:
            raise unknown_name("treatment of heads", self.heads, HEADS, error=AdapterError)
        weights = None if self.weights is None else _numbers(self.weights, "")
        by_layer = {e: _numbers(w, f" of layers '{e}'") for e, w in self.layer_weights.items()}
        for expression in by_layer:
            _check_expression(expression)
        self._set(options=options, weights=weights, layer_weights=by_layer)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _settle_rank(self) -> None:
        """A rank that is one, and an energy where it is "auto" alone."""
        if self.rank is None and self.energy is not None:
            self._set(rank=AUTO)
        if self.rank == AUTO:
            energy = ENERGY if self.energy is None else self.energy
            if not 0 < energy <= 1:
                raise MergeError(
                    f"the energy {energy} is no part to keep: give a number above 0 and at most 1, "
                    f"as {ENERGY}."
                )
            self._set(energy=float(energy))
        elif self.energy is not None:
            raise MergeError(
                f"the energy {self.energy} goes with the rank '{AUTO}', not {self.rank!r}: give "
                "one of the two."
            )
        if isinstance(self.rank, str) and self.rank not in (SUM, FULL, AUTO):
            raise MergeError(
                f"the rank '{self.rank}' is none: give a whole number, '{SUM}' (of the adapters' "
                f"ranks), '{AUTO}' (by kept energy) or '{FULL}' (nothing is cut)."
            )
        if not isinstance(self.rank, str):
            check_rank("rank", self.rank)

    @classmethod
    def of(cls, config: MergeConfig | None = None, /, **asked: Any) -> MergeConfig:
        """The configuration that keyword arguments ask for, or `config` as they change it.

        Names of fields are fields, None says nothing, and all else is an option of the method:
        `MergeConfig.of(method="ties", weights=0.5, density=0.2)`. Another method than that of
        `config` takes none of its options.
        """
        known = {name: asked.pop(name) for name in FIELDS if name in asked}
        chosen = {name: value for name, value in known.items() if value is not None}
        options: dict[str, Any] = {**chosen.pop("options", {}), **asked}
        if config is None:
            return cls(**chosen, options=options)
        if chosen.get("method", config.method) == config.method:
            options = {**config.options, **options}
        if "rank" in chosen:  # the energy goes with the rank that it was given with
            chosen.setdefault("energy", None)
        return replace(config, **chosen, options=options)

    def for_adapter(self) -> MergeConfig:
        """The same, with the rank that an adapter has where none was asked for.

        A dense update would fill an adapter as wide as the layer. A method that gives factors
        whatever its options has nothing to cut, and is left as it is.
        """
        method = get_method(self.method)
        if self.rank is not None or (method.low_rank and not method.open_options):
            return self
        return replace(self, rank=SUM)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method must be given in addition to the adapters: "moments", "fisher"."""
        return get_method(self.method).needs

    @property
    def arguments(self) -> dict[str, Any]:
        """The options by the names of the method's parameters."""
        return {parameter_of(name): value for name, value in self.options.items()}

    @property
    def weight_rule(self) -> DefaultWeight:
        """The method's rule for the weight of every adapter where none is given."""
        return get_method(self.method).weight_rule(self.arguments)

    def spread(self, count: int) -> list[float]:
        """The weight of each of `count` adapters, by the method's rule where none is given.

        Raises:
            MergeError: another number of weights.
        """
        if self.weights is not None:
            return spread(self.weights, count)
        sizes = {"1/√N": count**-0.5, "1/N": 1 / count, "1": 1.0}
        return [sizes[self.weight_rule]] * count

    def by_layer(self, count: int, layers: Sequence[str]) -> dict[str, list[float]]:
        """The weights of each layer that an expression matches; the first that does decides.

        Raises:
            MergeError: another number of weights, or an expression that matches no layer.
        """
        found: dict[str, list[float]] = {}
        for expression, weights in self.layer_weights.items():
            values = spread(weights, count, f" of layers '{expression}'")
            matched = [name for name in layers if re.search(expression, name)]
            if not matched:
                raise MergeError(
                    f"no layer matches '{expression}': layers are named as '{layers[0]}'."
                )
            for name in matched:
                found.setdefault(name, values)
        return found

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON; `from_dict` reads it back."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "weights": _plain(self.weights),
            "layer_weights": {name: _plain(w) for name, w in self.layer_weights.items()},
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeConfig:
        """What `to_dict` gave, checked as any other configuration; absent fields are the defaults.

        Raises:
            UnknownNameError: a key that is no field; and what the constructor raises.
        """
        for key in values:
            if key not in FIELDS:
                raise unknown_name("key", key, FIELDS, where="the configuration of a merge")
        return cls.of(**values)


FIELDS = tuple(f.name for f in fields(MergeConfig))


def spread(weights: Weights, count: int, what: str = "") -> list[float]:
    """One weight for each of `count` adapters.

    Raises:
        MergeError: another number of weights.
    """
    if isinstance(weights, int | float):
        return [float(weights)] * count
    if len(weights) != count:
        raise MergeError(
            f"{len(weights)} weights{what} for {count} adapters: give one weight for each adapter, "
            "or a single number."
        )
    return [float(weight) for weight in weights]


def _numbers(given: Weights, what: str) -> float | tuple[float, ...]:
    """Finite numbers, as they are kept."""
    values = (given,) if isinstance(given, int | float) else tuple(given)
    for number, weight in enumerate(values, start=1):
        if not math.isfinite(weight):
            raise MergeError(
                f"the weight{what} of adapter {number} is {weight}: it must be finite."
            )
    if isinstance(given, int | float):
        return float(given)
    return tuple(float(weight) for weight in values)


def _plain(weights: Weights | None) -> list[float] | float | None:
    return list(weights) if isinstance(weights, Sequence) else weights


def _check_expression(expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as problem:
        raise MergeError(
            f"'{expression}' is not a regular expression ({problem}): give one that finds "
            "layer names, as 'layer\\.[0-5]\\.'."
        ) from problem
