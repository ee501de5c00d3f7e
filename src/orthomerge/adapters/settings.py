"""`adapter_config.json` as a stranger may have written it: what is read of it is held to its type.

PEFT takes the keys of `rank_pattern` and `alpha_pattern` for regular expressions, so a file could
bring one that never ends: only those without repeats of repeats are taken.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from orthomerge.adapters.hub import on_disk
from orthomerge.adapters.mistaken import no_adapter
from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, is_object, read_json
from orthomerge.io.files import local
from orthomerge.io.names import CONFIG

LONGEST = 1024
"""Characters of a layer's name or of an expression for one."""
_PAIRS = 10**7
_REPEATS = 3

_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Rank = Annotated[int, Field(strict=True, gt=0, le=2**31)]
_Names = list[StrictStr]
_TASK_TYPES = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip


def _known_task_type(kind: str) -> str:
    """One of those that PEFT has; a PEFT that came later may have more."""
    if kind not in _TASK_TYPES:
        from peft import TaskType

        TaskType(kind)
    return kind


class _Settings(BaseModel):
    """The keys that are used here, and the types PEFT gives them; others may be anything."""

    model_config = ConfigDict(extra="ignore", strict=True)

    peft_type: StrictStr | None = None
    task_type: Annotated[StrictStr, AfterValidator(_known_task_type)] | None = None
    base_model_name_or_path: StrictStr | None = None
    revision: StrictStr | None = None
    target_modules: StrictStr | _Names | None = None
    target_parameters: _Names | None = None
    modules_to_save: _Names | None = None
    bias: StrictStr | None = None
    use_rslora: StrictBool | None = None
    use_dora: StrictBool | None = None
    lora_bias: StrictBool | None = None
    fan_in_fan_out: StrictBool | None = None


class _Lora(_Settings):
    """What a LoRA adapter has besides."""

    r: _Rank
    lora_alpha: _Finite | StrictInt
    rank_pattern: dict[StrictStr, _Rank] | None = None
    alpha_pattern: dict[StrictStr, _Finite | StrictInt] | None = None


def read_settings(folder: Path, source: str) -> dict[str, Any]:
    """The configuration of the adapter in `folder`, every key that is used of its type.

    Raises:
        AdapterError: no such file, one that is no JSON of an adapter, a key of another type, or an
            expression that could run for ever.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise no_adapter(folder, source)
    try:
        config = read_json(file)
    except (Unreadable, OSError) as problem:
        raise AdapterError(f"'{file}' cannot be read as JSON: {problem}.") from problem
    if not is_object(config):
        raise AdapterError(f"'{file}' is no adapter's configuration: save the adapter again.")
    try:
        (_Lora if config.get("peft_type") == "LORA" else _Settings).model_validate(config)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(p) for p in first["loc"][:2])[:80]
        raise AdapterError(
            f"'{file}': '{key}' is {_short(first['input'])}: {first['msg']}; save the adapter "
            "again."
        ) from problem
    return config


def check_folders(named: Iterable[str | Path]) -> None:
    """Refuse paths at which there is nothing, before anything slow is imported.

    Raises:
        AdapterError: there is such; the message names the nearest.
    """
    for item in named:
        if on_disk(item) and not local(item).exists():
            raise no_adapter(local(item), str(item))


def _short(value: Any) -> str:
    said = repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
    return said if len(said) <= 60 else f"{said[:57]}..."


class LayerPatterns:
    """What PEFT takes for a layer: keys are regular expressions for the end of its name.

    Raises:
        AdapterError: an expression that is none, that could run for ever, or too many of them.
    """

    def __init__(self, patterns: Mapping[str, Any] | None, otherwise: Any, where: str) -> None:
        self._otherwise = otherwise
        self._values = dict(patterns or {})
        self._compiled = [(_compiled(key, where), value) for key, value in self._values.items()]

    def of(self, layer: str) -> Any:
        """The value of a layer: of the first expression that finds it, else the common one."""
        for expression, value in self._compiled:
            if expression.match(layer):
                return value
        return self._values.get(layer, self._otherwise)

    def __len__(self) -> int:
        return len(self._compiled)


def check_names(layers: Iterable[str], patterns: Iterable[LayerPatterns], where: str) -> None:
    """Refuse names and expressions whose search would take for ever.

    Raises:
        AdapterError: a layer's name that is too long, or too many names for so many expressions.
    """
    names = list(layers)
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST:
        raise AdapterError(
            f"'{where}' names a layer in {len(longest):,} characters ('{longest[:40]}...'): names "
            f"have at most {LONGEST:,}."
        )
    pairs = len(names) * max(len(p) for p in patterns)
    if pairs > _PAIRS:
        raise AdapterError(
            f"'{where}' has patterns of rank or alpha for far more layers than it has: save the "
            "adapter again."
        )


def _compiled(key: str, where: str) -> re.Pattern[str]:
    refused = (
        f"'{where}' has the rank or alpha pattern '{key[:60]}', which is no expression for layers "
    )
    try:
        if len(key) > LONGEST:
            raise ValueError(f"it has {len(key):,} characters")
        _check_ends(parser.parse(key), inside=False)
        if _repeats(parser.parse(key)) > _REPEATS:
            raise ValueError(f"it has more than {_REPEATS} repeats, and could run for ever")
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, ValueError, OverflowError, RecursionError) as problem:
        raise AdapterError(f"{refused}({problem}): save the adapter again.") from problem


# What `re` itself parses with; it gives these modules no types.
parser: Any = importlib.import_module("re._parser")
codes: Any = importlib.import_module("re._constants")
_LOOPS: tuple[Any, ...] = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


def _parts(node: Any) -> Iterable[tuple[Any, list[Any]]]:
    """The operations of a parsed expression, each with the expressions inside it."""
    for operation, argument in node:
        yield operation, [item for item in _nested(argument) if isinstance(item, parser.SubPattern)]


def _nested(argument: Any) -> Iterable[Any]:
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in cast(Sequence[Any], argument):
            yield from _nested(item)


def _check_ends(node: Any, *, inside: bool) -> None:
    """Refuse repeats of repeats and of choices, and references back: they may take for ever."""
    for operation, below in _parts(node):
        loop = operation in _LOOPS
        if operation in (codes.GROUPREF, codes.GROUPREF_EXISTS) or (
            inside and (loop or operation is codes.BRANCH)
        ):
            raise ValueError("it repeats a repeat or a choice, or refers back")
        for part in below:
            _check_ends(part, inside=inside or loop)


def _repeats(node: Any) -> int:
    return sum((op in _LOOPS) + sum(map(_repeats, below)) for op, below in _parts(node))
