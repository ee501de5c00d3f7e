"""What the fuzzer makes broken files of: honest values with nasty ones in them, bytes scratched."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, 2**62, 10**30, -(10**18), 0.5, -0.0, 1e308, 1e-308,
    float("nan"), float("inf"), float("-inf"), "", "x", "../../x", "/etc/passwd", "a\\b", "\x00",
    "é\u202e", "x" * 3000, "1e999", "(a+)+$", "[", [], {}, [[]], [1] * 1000, {"": None},
    {"a": {"a": {"a": {}}}}, [None, "a", 1], "F64", "I8", [2**31, 2**31], [0, 0], "LORA", "ties",
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        value = _change(value, rng)
    return value


def _change(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.08:
        if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
            return value * rng.choice([-1, 2, 10, 0.5, 2**20]) + rng.choice([-1, 0, 1])
        return copy.deepcopy(rng.choice(NASTY))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[str(rng.choice(NASTY))[:200]] = value.pop(key)
    elif kind < 0.25 and isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    else:
        value[key] = _change(value[key], rng)
    return value


def scratched(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(found) + 1), rng.randrange(4)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at : at + rng.randint(1, 40)]
        elif kind == 2:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        else:
            found[at:at] = rng.choice([b"\x00", b"\xff", b'"', b"{", b"[" * 200, b"9" * 40, b"\n"])
    return bytes(found)


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """JSON of the value, changed, and now and then scratched."""
    data = json.dumps(mutated(value, rng)).encode()
    return scratched(data, rng) if rng.random() < 0.2 else data


def with_header(data: bytes, rng: random.Random, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with its header changed, its length often told as it is."""
    (size,) = struct.unpack("<Q", data[:8])
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    text += b" " * (-len(text) % 8)
    told = len(text) if rng.random() < 0.95 else rng.choice([0, 1, 2**20, 2**40, 2**63])
    made = struct.pack("<Q", told) + text + data[8 + size :]
    return scratched(made, rng) if rng.random() < 0.2 else made


class Left(AssertionError):
    """Something half-written was left behind."""


def nothing_but(folder: Path, names: set[str]) -> None:
    """Hold a folder to it that nothing came into it."""
    if left := {p.name for p in folder.iterdir()} - names:
        raise Left(f"left behind: {left}")


class Target(NamedTuple):
    """A kind of input: its share of all inputs, and what makes and reads one."""

    name: str
    share: float
    once: Callable[[random.Random], None]
