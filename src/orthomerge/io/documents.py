"""JSON and YAML from anybody, read within bounds: a small file must not fill a machine or a page.

What is refused is refused before it costs anything: long files, deep nesting, numbers of more than
64 bits, half characters, and YAML whose aliases stand for far more than is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard, cast

import yaml

JSON_BYTES, YAML_BYTES = 64 * 2**20, 2**20
"""How long a file may be; the index of the largest models is a few MB, a recipe a few kB."""
DEPTH = 64
"""How deep values may be nested."""
YAML_NODES = 100_000
"""How many values a YAML text may stand for, its aliases written out."""

_WIDEST = 2**63
# What PyYAML's makers of values let through for tags and scalars that do not fit.
_NOT_YAML = (
    yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value of a document is an object; its keys are strings in JSON, not all in YAML."""
    return isinstance(value, dict)


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Whether a value of a document is a list."""
    return isinstance(value, list)


class Unreadable(ValueError):
    """Why a text is no document that is read here, in a clause without a full stop."""


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        Unreadable: it is too long, not UTF-8, or not what `parse_json` takes.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, JSON_BYTES))


def object_in(path: Path) -> dict[str, Any]:
    """The object of a JSON file that may be another program's; empty where it holds none."""
    try:
        value = read_json(path) if path.is_file() else None
    except (Unreadable, OSError):
        value = None
    return value if is_object(value) else {}


def parse_json(text: str) -> Any:
    """The value of a JSON text; NaN and infinity are read, as Python writes them.

    Raises:
        Unreadable: not JSON, nested too deeply, a whole number of more than 64 bits, or half a
            character.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError as problem:
        raise Unreadable(f"values are nested more than {DEPTH} deep") from problem
    except Unreadable:
        raise
    except ValueError as problem:
        raise Unreadable(str(problem).rstrip(".")) from problem
    _check(value)
    return value


def read_index(path: str | Path) -> dict[str, str]:
    """The file of every tensor of a sharded checkpoint, each safetensors and beside the index.

    Raises:
        Unreadable: no index, or one that names another kind of file or one elsewhere.
        OSError: it cannot be read.
    """
    value = read_json(path)
    by_key = value.get("weight_map") if is_object(value) else None
    if not is_object(by_key):
        raise Unreadable("it has no 'weight_map'")
    for shard in by_key.values():
        plain = isinstance(shard, str) and Path(shard).name == shard and "\0" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise Unreadable(
                f"it names the shard {str(shard)[:60]!r}, which is no safetensors file beside it"
            )
    return by_key


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the safe loader.

    Raises:
        Unreadable: not YAML, nested too deeply, a whole number of more than 64 bits, or aliases
            that stand for more than `YAML_NODES` values.
    """
    loader: yaml.SafeLoader | None = None
    try:
        if len(text) > YAML_BYTES:
            raise Unreadable(f"it is longer than {YAML_BYTES:,} characters")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        value = cast(Any, loader).construct_document(node)
    except Unreadable:
        raise
    except RecursionError as problem:
        raise Unreadable(f"values are nested more than {DEPTH} deep") from problem
    except _NOT_YAML as problem:
        place = getattr(problem, "problem_mark", None)
        line = f"line {place.line + 1}: " if place else ""
        said = getattr(problem, "problem", None) or str(problem) or type(problem).__name__
        raise Unreadable(f"{line}{str(said).splitlines()[0].rstrip('.')}") from problem
    finally:
        if loader is not None:
            loader.dispose()
    _check(value)
    return value


def read_text(path: str | Path, most: int) -> str:
    """A text file of at most so many bytes; raises as `read_json` does."""
    with Path(path).open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise Unreadable(f"it is longer than {most:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise Unreadable(f"it is not UTF-8 text (byte {problem.start})") from problem


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -_WIDEST <= int(digits) < _WIDEST:
        raise Unreadable(f"a whole number of {len(digits)} digits is more than 64 bits hold")
    return int(digits)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _check(value: Any) -> None:
    """Depth, width of whole numbers and whole characters, level by level without recursion."""
    level = [value]
    for _ in range(DEPTH + 1):
        if not level:
            return
        for item in level:
            if isinstance(item, str) and not item.isascii():
                _check_characters(item)
            elif isinstance(item, int) and not -_WIDEST <= item < _WIDEST:
                raise Unreadable("a whole number is more than 64 bits hold")
        level = [child for item in level for child in _children(item)]
    raise Unreadable(f"values are nested more than {DEPTH} deep")


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise Unreadable("a text holds half a character (a lone surrogate)") from problem


def _measure(root: yaml.Node) -> None:
    """Refuse a graph of nodes that stands for too many values, or for itself, before it is made."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, left = stack.pop()
        below = _below(node)
        if left:
            open_.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in below)
            if sizes[id(node)] > YAML_NODES:
                raise Unreadable(
                    f"it stands for more than {YAML_NODES:,} values, its aliases written out"
                )
        elif id(node) not in sizes:
            if id(node) in open_:
                raise Unreadable("an alias stands for a value that holds it")
            open_.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in below)


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [end for pair in node.value for end in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
