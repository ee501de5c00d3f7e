"""The merge methods by name: a table that can be read as a list."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

from torch import Tensor

from orthomerge.errors import MergeError, unknown_name
from orthomerge.factors import LoraFactors

Update = LoraFactors | Tensor
"""One layer's update: in factors where a method keeps them, else dense `[d_out, d_in]`."""

ENTRY_POINTS = "orthomerge.merging_methods"
"""The group of entry points under which other packages bring merge methods."""

# Parameters a method asks for by name; they are given by `merge_layers` and are no options.
GIVEN = ("generator", "moments", "fisher", "over_model")


DefaultWeight = Literal["1/√N", "1/N", "1"]
"""The weight of each of N adapters where none is given.

"1/√N" is for what grows like the sum of the updates: nearly orthogonal updates of one size then
add up to about the size of one. "1/N" is for what grows like the sum of their norms, "1" for what
averages, or keeps the size of one update by itself.
"""


@dataclass(frozen=True)
class PerTask:
    """What a method returns that leaves one update a task: the shared one, and each task's own."""

    shared: Update
    tasks: Sequence[Update]


@dataclass(frozen=True)
class Truncated:
    """What a method returns that cuts the rank itself: the update, and the share that was lost.

    `error` is `‖whole - update‖ / ‖whole‖` in the norm the method minimises.
    """

    update: LoraFactors
    error: float


MergeFunction = Callable[..., "Update | PerTask | Truncated"]
"""`function(factors, weights, *, [what is given,] **options)`: one layer, pure."""

Survey = Callable[[Sequence[LoraFactors], Sequence[float]], Tensor]
"""What a method must know of one layer; it is given the sum over all layers as `over_model()`."""

_F = TypeVar("_F", bound=MergeFunction)


@dataclass(frozen=True)
class Alias:
    """Another name of a method: who calls it so, and where."""

    name: str
    title: str
    paper: str
    url: str


@dataclass(frozen=True)
class MergeMethod:
    """A registered merge method and what is promised of it.

    `options` are the function's keyword-only parameters with their defaults; `open_options`: it
    passes further ones on to the method named by its option `inner`. `needs` names what it must be
    given beside the adapters: "moments" (each adapter's statistics), "fisher" (each adapter's
    diagonal Fisher information). `aliases` are other names of the same method; found by one of
    them, `name`, `title`, `paper` and `url` are the alias's and `alias_of` is the method's own
    name. `symmetric`: the order of the adapters (each with its weight) does not matter. `random`:
    it draws from the generator it is given. `low_rank`: with default options the result is a
    `LoraFactors`. `per_task`: it returns an update for every task. `by_factors`: the result depends
    on how an update is split between A and B, not on the product `s B A` alone; where the scaling
    `s` stands never matters. `survey`: what it looks at in every layer before it merges one.
    """

    name: str
    title: str
    summary: str
    paper: str
    url: str
    function: MergeFunction
    options: Mapping[str, Any]
    symmetric: bool = True
    random: bool = False
    low_rank: bool = False
    per_task: bool = False
    by_factors: bool = False
    survey: Survey | None = None
    needs: tuple[str, ...] = ()
    open_options: bool = False
    aliases: tuple[str, ...] = ()
    alias_of: str | None = None
    default_weight: DefaultWeight | Callable[[Mapping[str, Any]], DefaultWeight] = "1"

    def weight_rule(self, options: Mapping[str, Any]) -> DefaultWeight:
        """The rule for the weight where none is given, under these options."""
        rule = self.default_weight
        return rule({**self.options, **options}) if callable(rule) else rule


_METHODS: dict[str, MergeMethod] = {}
_ALIASES: dict[str, MergeMethod] = {}


def register(
    *,
    name: str,
    title: str,
    summary: str,
    paper: str,
    url: str,
    symmetric: bool = True,
    low_rank: bool = False,
    per_task: bool = False,
    by_factors: bool = False,
    survey: Survey | None = None,
    aliases: Sequence[Alias] = (),
    default_weight: DefaultWeight | Callable[[Mapping[str, Any]], DefaultWeight] = "1",
) -> Callable[[_F], _F]:
    """Make a function a merge method under `name`; its keyword-only parameters are its options.

    `aliases` are further names of the same method. The parameters `generator`, `moments`, `fisher`
    and `over_model` are no options but what the method asks to be given; one with a `generator` is
    random, one with `over_model` has a `survey`.

    Raises:
        MergeError: the name is taken.
    """

    def add(function: _F) -> _F:
        for taken in (name, *(alias.name for alias in aliases)):
            if taken in _METHODS or taken in _ALIASES:
                raise MergeError(
                    f"merging method '{taken}' is already registered; choose another name."
                )
        parameters = inspect.signature(function).parameters.values()
        asked = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        options = {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN
        }
        method = MergeMethod(
            name,
            title,
            summary,
            paper,
            url,
            function,
            MappingProxyType(options),
            symmetric,
            random="generator" in asked,
            low_rank=low_rank,
            per_task=per_task,
            by_factors=by_factors,
            survey=survey,
            needs=tuple(what for what in ("moments", "fisher") if what in asked),
            open_options=any(p.kind is p.VAR_KEYWORD for p in parameters),
            aliases=tuple(alias.name for alias in aliases),
            default_weight=default_weight,
        )
        _METHODS[name] = method
        for alias in aliases:
            _ALIASES[alias.name] = replace(
                method, name=alias.name, title=alias.title, paper=alias.paper, url=alias.url,
                alias_of=name,
            )  # fmt: skip
        return function

    return add


@cache
def _load_plugins() -> None:
    """Let installed packages register their methods, once.

    A plugin that fails is left out with a warning that names it: one broken package must not take
    the other methods away.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            _load(point)
        except Exception as problem:
            warnings.warn(
                f"the merging method '{point.name}' of '{point.value}' was left out: {problem}; "
                "mend or uninstall that package.",
                stacklevel=3,
            )


def _load(point: EntryPoint) -> None:
    """Import an entry point; a plain function is registered under the entry point's name."""
    found = point.load()
    if not callable(found):
        raise TypeError(f"'{point.value}' is not a function")
    function = cast(MergeFunction, found)
    if any(method.function is function for method in _METHODS.values()):
        return  # its own @register has run on import
    summary = (inspect.getdoc(function) or "A method of another package.").splitlines()[0]
    source = point.value.split(":")[0]
    register(name=point.name, title=point.name, summary=summary, paper=source, url="")(function)


def get_method(name: str) -> MergeMethod:
    """The merge method of that name or alias.

    Raises:
        UnknownNameError: no such method; the message lists them and names the nearest.
    """
    if name not in _METHODS and name not in _ALIASES:
        _load_plugins()
    found = _METHODS.get(name) or _ALIASES.get(name)
    if found is None:
        raise unknown_name("merging method", name, [*_METHODS, *_ALIASES])
    return found


def list_methods() -> list[MergeMethod]:
    """All merge methods, in the order of registration, those of other packages last.

    A method with several names is listed once; the others are its `aliases`.
    """
    _load_plugins()
    return list(_METHODS.values())
