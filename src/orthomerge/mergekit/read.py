"""A mergekit configuration read, every key, model and parameter of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orthomerge.errors import MergeError, reason, unknown_name
from orthomerge.io.documents import (
    YAML_BYTES,
    Unreadable,
    is_array,
    is_object,
    parse_yaml,
    read_text,
)
from orthomerge.io.files import local
from orthomerge.mergekit.methods import METHODS, Method, Parameters, listed
from orthomerge.merging import MergeConfig

_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype",
         "tokenizer_source", "tokenizer", "chat_template", "slices", "modules")  # fmt: skip
_DRAWS = (
    "{method} draws at random: the draws are ours, and what is kept is divided by its probability, "
    "where mergekit keeps the sum of magnitudes"
)


class MergekitPlan(NamedTuple):
    """A configuration in our words: what `merge_adapters` takes, and what is not quite the same."""

    adapters: list[str]
    config: MergeConfig
    notes: list[str]


def read_mergekit(path: str | Path) -> MergekitPlan:
    """The merge that a mergekit configuration asks for, over adapters of one base.

    A model is `base+adapter`, as in mergekit, or an adapter's folder or hub id. Every model must be
    one; the base itself may stand among them, as it does there.

    Raises:
        MergeError: an unreadable file, a key, method or parameter that is not known, models of
            several bases, or what cannot be done to adapters.
    """
    values = _read(path)
    where = f"'{path}'"
    for key, what in (("slices", "layers of several models"), ("modules", "parts of models")):
        if values.get(key) is not None:
            raise MergeError(
                f"{where} puts a model together from {what} ('{key}'), which needs whole models: "
                "list 'models', or use mergekit itself."
            )
    name = values.get("merge_method")
    if name not in METHODS:
        raise unknown_name("merge method", str(name), METHODS, where=where, error=MergeError)
    method = METHODS[name]
    found = _models(values, where)
    base = _base(found, values.get("base_model"), where)
    adapters = [m for m in found if m.adapter is not None]
    if not adapters:
        raise MergeError(f"{where} names no adapter: write models as 'base+adapter'.")
    shared = _shared(method, name, values.get("parameters"), where)
    models = [_own(method, name, m, values.get("parameters"), where) for m in adapters]
    beside = [m for m in found if m.adapter is None]
    if name == "linear" and values.get("base_model") and not beside:
        raise MergeError(
            f"{where}: to mergekit's 'linear' the base_model is one more model: list it under "
            "'models' with its weight, or leave it out."
        )
    rest = [_own(method, name, m, values.get("parameters"), where) for m in beside]
    base_weights = [p["weight"] for p in rest] if name == "linear" else []
    if "t" in shared and _first_is_second(adapters, values.get("base_model")):
        adapters.reverse()
    weights, options = method.read(method, name, Parameters(models, shared, base_weights))
    config = MergeConfig(method.name, weights, options={**method.options, **options}, base=base)
    return MergekitPlan(
        [str(m.adapter) for m in adapters], config, _notes(method, name, values, options)
    )


class _Model(NamedTuple):
    base: str | None
    adapter: str | None
    parameters: Mapping[str, Any]
    named: str


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = parse_yaml(read_text(local(path), YAML_BYTES))
    except (OSError, Unreadable) as problem:
        raise MergeError(f"'{path}' cannot be read: {reason(problem)}.") from problem
    if not is_object(values):
        raise MergeError(f"'{path}' is no mergekit configuration: it has no 'merge_method'.")
    for key in values:
        if key not in _KEYS:
            raise unknown_name("key", str(key), _KEYS, where=f"'{path}'", error=MergeError)
    return values


def _models(values: Mapping[str, Any], where: str) -> list[_Model]:
    found: list[_Model] = []
    given = values.get("models")
    if not is_array(given) or not given:
        raise MergeError(f"{where} lists no 'models': write 'base+adapter' for each.")
    for item in given:
        if not is_object(item) or not isinstance(item.get("model"), str):
            raise MergeError(f"a model of {where} has no 'model' with 'base+adapter': {item!r}.")
        for key in item:
            if key not in ("model", "parameters"):
                raise unknown_name(
                    "key", str(key), ("model", "parameters"), where=where, error=MergeError
                )
        base, plus, adapter = item["model"].partition("+")
        alone = adapter if plus else base
        if not plus and base == values.get("base_model"):
            found.append(_Model(base, None, item.get("parameters") or {}, item["model"]))
        else:
            found.append(
                _Model(base if plus else None, alone, item.get("parameters") or {}, item["model"])
            )
    return found


def _base(models: Sequence[_Model], named: Any, where: str) -> str | None:
    """The one base of all models; `base_model` may be one of them with its adapter (slerp)."""
    bases = {m.base for m in models if m.base is not None}
    if named is not None and all(named != m.named for m in models if m.adapter is not None):
        bases.add(str(named))
    if len(bases) > 1:
        raise MergeError(
            f"{where} names the bases {listed(sorted(bases))}, and adapters are merged on one: an "
            "update belongs to the weights it was trained on."
        )
    return bases.pop() if bases else None


def _first_is_second(adapters: Sequence[_Model], named: Any) -> bool:
    """Whether slerp starts at the second model: `t` counts from the base model."""
    return len(adapters) == 2 and named == adapters[1].named


def _shared(method: Method, name: str, given: Any, where: str) -> dict[str, Any]:
    found = dict(method.shared)
    asked: dict[str, Any] = given or {}
    for key, value in asked.items():
        if key == "int8_mask":  # how masks are held while mergekit works
            continue
        if key in method.own:
            continue
        if key not in found:
            known = [*method.own, *method.shared]
            raise unknown_name("parameter", str(key), known, where=f"{where} ({name})",
                               error=MergeError)  # fmt: skip
        flag = isinstance(found[key], bool)
        found[key] = value if flag and isinstance(value, bool) else _scalar(key, value, where)
    missing = [key for key, value in found.items() if value is None]
    if missing:
        raise MergeError(f"{where} has no '{missing[0]}' under 'parameters', which {name} needs.")
    return found


def _own(method: Method, name: str, model: _Model, shared: Any, where: str) -> dict[str, float]:
    found = dict(method.own)
    common: dict[str, Any] = shared or {}
    for key in common.keys() & found.keys():
        found[key] = _scalar(key, common[key], where)
    for key, value in model.parameters.items():
        if key not in found:
            raise unknown_name("parameter", str(key), list(found), where=f"{where} ({name})",
                               error=MergeError)  # fmt: skip
        found[key] = _scalar(key, value, where)
    if found.get("weight", 0) is None and (model.adapter is not None or name == "linear"):
        raise MergeError(f"{where}: '{model.named}' has no 'weight', which {name} needs.")
    return {key: float(value) for key, value in found.items() if value is not None}


def _scalar(key: str, value: Any, where: str) -> float:
    """One number; YAML takes 1e-3 for a word."""
    if isinstance(value, list | dict):
        raise MergeError(
            f"{where} gives '{key}' by layer ({value!r}): give one number here, and weights by "
            "layer with 'orthomerge merge --layer-weights'."
        )
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MergeError(f"'{key}' of {where} is not a number: {value!r}.")
    return number


def _notes(
    method: Method, name: str, values: Mapping[str, Any], options: Mapping[str, Any]
) -> list[str]:
    """What is not quite what mergekit would do."""
    notes = [method.note] if method.note else []
    if method.random and options.get("density", 1.0) < 1:
        notes.append(_DRAWS.format(method=name))
    left = [k for k in ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")
            if values.get(k) not in (None, "base")]  # fmt: skip
    if left:
        notes.append(
            f"{listed(left)} left out: adapters keep their type, and the base its tokenizer"
        )
    return notes
