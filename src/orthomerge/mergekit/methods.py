"""mergekit's methods in our words: which method, weights and options, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from orthomerge.errors import MergeError

_SLERP = (
    "slerp goes along the arc between the updates, mergekit's between the whole weights, which is "
    "nearly the line"
)


class Method(NamedTuple):
    """One of mergekit's methods: ours, with what options, and what mergekit leaves unsaid.

    `read` turns a configuration's parameters into our weights and options; `own` are the parameters
    of single models, `shared` those of all, each with mergekit's default (None: it has none).
    """

    name: str
    read: Callable[[Method, str, Parameters], tuple[list[float], dict[str, Any]]]
    own: Mapping[str, float | None] = {}
    shared: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    random: bool = False
    note: str = ""


class Parameters(NamedTuple):
    """Parameters by model (adapters, in order), of all, and the weights of models that are a base.

    A base among the models adds nothing to an update, but counts where weights are divided.
    """

    models: list[dict[str, float]]
    shared: dict[str, Any]
    base_weights: list[float]

    def one(self, name: str, method: str) -> float:
        """The one value of a parameter that our method has once for all adapters."""
        values = {p[name] for p in self.models}
        if len(values) > 1:
            raise MergeError(
                f"the models have several values of '{name}' ({listed(sorted(values))}), and "
                f"'{method}' takes one for all adapters: give one."
            )
        return values.pop()

    @property
    def weights(self) -> list[float]:
        """One an adapter."""
        return [p["weight"] for p in self.models]


def _summed(method: Method, name: str, given: Parameters) -> tuple[list[float], dict[str, Any]]:
    """A weighted sum: normalisation and λ go into the weights."""
    total = sum(given.weights) if given.shared["normalize"] else 1.0
    if abs(total) < 1e-8:
        raise MergeError(f"'normalize' of '{name}' divides by weights that sum to zero.")
    scale = given.shared["lambda"] / total
    return [w * scale for w in given.weights], _pruned(method, name, given)


def _elected(method: Method, name: str, given: Parameters) -> tuple[list[float], dict[str, Any]]:
    """A sign election: with equal weights, which cancel out there, it is ours."""
    weight = given.one("weight", name) if len(set(given.weights)) == 1 else None
    if weight is None or weight <= 0:
        raise MergeError(
            f"'{name}' with the weights {listed(given.weights)}: mergekit lets weights elect the "
            "signs, here the updates do; give all models one positive weight, and scale with "
            "'lambda'."
        )
    if not given.shared["normalize"]:
        raise MergeError(
            f"'{name}' without 'normalize: true' leaves the sum of those that agree; here it is "
            "their mean, as in the paper: add 'normalize: true'."
        )
    options = {**_pruned(method, name, given), "lambda": given.shared["lambda"]}
    return [1.0] * len(given.models), options


def _pruned(method: Method, name: str, given: Parameters) -> dict[str, Any]:
    """Options of a sparsifier: one density for all adapters, ε as the whole window."""
    found = {n: given.one(n, name) for n in method.own if n != "weight"}
    whole = found.get("density", 1.0) == 1
    if bool(given.shared.get("rescale", method.random)) != method.random and not whole:
        said = "divides what it keeps" if method.random else "does not rescale"
        raise MergeError(f"'{name}' {said} here: leave 'rescale' out.")
    if "epsilon" in found:
        found["epsilon"] *= 2
    return found


def _averaged(method: Method, name: str, given: Parameters) -> tuple[list[float], dict[str, Any]]:
    """Whole models added: their updates are, where the weights of the models sum to one."""
    total = sum(given.weights) + sum(given.base_weights)
    if given.shared["normalize"] and abs(total) >= 1e-8:
        return [w / total for w in given.weights], {}
    if abs(total - 1) > 1e-6:
        raise MergeError(
            f"weights of 'linear' that sum to {total:g} scale the base as well, which no adapter "
            "can: use 'normalize: true', or 'task_arithmetic'."
        )
    return given.weights, {}


def _along(method: Method, name: str, given: Parameters) -> tuple[list[float], dict[str, Any]]:
    """Two adapters, and how far to go from the first to the second."""
    if len(given.models) != 2:
        raise MergeError(f"'{name}' is between two adapters, not {len(given.models)}.")
    if "t" in given.shared:
        t = given.shared["t"]
        if not isinstance(t, int | float) or not 0 <= t <= 1:
            raise MergeError(f"'t' of '{name}' is a number from 0 to 1, not {t!r}.")
        return [1.0 - t, float(t)], {}
    return given.weights, {}


def _plain(method: Method, name: str, given: Parameters) -> tuple[list[float], dict[str, Any]]:
    """A method without weights."""
    if given.shared.get("filter_wise"):
        raise MergeError(f"'filter_wise' of '{name}' is not known here: leave it out.")
    options = {"select_topk": given.shared["select_topk"]} if "select_topk" in given.shared else {}
    return [1.0] * len(given.models), options


_SUM = {"normalize": False, "lambda": 1.0, "rescale": False}
_DENSE = {"weight": None, "density": 1.0}

METHODS: dict[str, Method] = {
    "linear": Method("linear", _averaged, {"weight": None}, {"normalize": True}),
    "task_arithmetic": Method("linear", _summed, {"weight": None}, _SUM),
    "ties": Method("ties", _elected, _DENSE, {**_SUM, "normalize": True}),
    "dare_linear": Method("dare_linear", _summed, _DENSE, {**_SUM, "rescale": True}, random=True),
    "dare_ties": Method("dare_ties", _elected, _DENSE, {**_SUM, "rescale": True}, random=True),
    "breadcrumbs": Method("breadcrumbs", _summed, {**_DENSE, "gamma": 0.01}, _SUM),
    "breadcrumbs_ties": Method(
        "compose", _elected, {**_DENSE, "gamma": 0.01}, _SUM,
        {"sparsifier": "band", "consensus": "elect"},
    ),
    "della": Method(
        "della", _elected, {**_DENSE, "epsilon": 0.15},
        {"normalize": True, "lambda": 1.0, "rescale": True}, random=True,
    ),
    "della_linear": Method(
        "compose", _summed, {**_DENSE, "epsilon": 0.15}, {**_SUM, "rescale": True},
        {"sparsifier": "magprune"}, random=True,
    ),
    "sce": Method("sce", _plain, {}, {"select_topk": 1.0}),
    "model_stock": Method("model_stock", _plain, {}, {"filter_wise": False}),
    "nuslerp": Method("slerp", _along, {"weight": None}),
    "slerp": Method("slerp", _along, {}, {"t": None}, note=_SLERP),
}  # fmt: skip
"""mergekit's methods that are here, too."""


def listed(values: Sequence[Any]) -> str:
    """Values for a sentence."""
    return ", ".join(f"{v:g}" if isinstance(v, float) else f"'{v}'" for v in values)
