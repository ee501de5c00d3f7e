"""Safetensors files that carry hashes of their tensors and of their metadata, and are held to them.

All metadata is one entry, since safetensors has no order among several: equal content gives equal
bytes. What `digest` gives for a part goes into the metadata, whose own hash stands beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orthomerge.errors import StatisticsError, reason
from orthomerge.io.documents import is_object, parse_json
from orthomerge.io.files import atomic_path, fingerprint
from orthomerge.io.names import MadeBy
from orthomerge.io.outputs import require_free_file
from orthomerge.io.tensors import write_tensors

# What a file from somebody else can make go wrong in its readers; nothing of it is our fault.
_UNREADABLE = (
    SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class SealedKind:
    """One kind of file: the name of its metadata entry, its format, and words for its errors.

    Files of the formats `older` are read, too.
    """

    entry: str
    format: int
    made: MadeBy
    content: str
    older: tuple[int, ...] = ()

    def save(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        content: dict[str, Any],
        *,
        replace: bool = False,
    ) -> None:
        """Write tensors and metadata, at once or not at all.

        With `replace` the caller vouches for what is there now, as a damaged file of ours.

        Raises:
            OutputError: there is a file of another kind.
            OrthomergeError: the path cannot be written.
        """
        if path.is_file() and not replace:
            require_free_file(path, self.wrote)
        header = {self.entry: json.dumps({"sha256": fingerprint(content), **content})}
        with atomic_path(path) as temporary:
            write_tensors(temporary, {n: tensors[n] for n in sorted(tensors)}, header)

    @contextmanager
    def open(self, path: Path) -> Generator[Any, None, None]:
        """The file's tensors by name; what goes wrong inside is a `StatisticsError` that names it.

        Raises:
            StatisticsError: the file is cut, altered, or not safetensors.
        """
        try:
            with cast(Any, safe_open(path, framework="pt")) as stream:
                yield stream
        except StatisticsError:
            raise
        except _UNREADABLE as problem:
            raise StatisticsError(
                f"'{path}' cannot be read as {self.content} ({reason(problem)}): it was cut, "
                "altered or never one; collect it again."
            ) from problem

    def metadata(self, path: Path, stream: Any) -> dict[str, Any]:
        """The metadata as it was written; to be called within `open`.

        Raises:
            StatisticsError: a file of another kind or format.
            ValueError: metadata that was altered.
        """
        header: dict[str, str] = stream.metadata() or {}
        if self.entry not in header:
            raise StatisticsError(
                f"'{path}' is not a {self.made.file}: make one with '{self.made.command}'."
            )
        content = parse_json(header[self.entry])
        if not is_object(content):
            raise ValueError("its metadata is no object")
        digest = content.pop("sha256", None)
        if content.get("format") not in (self.format, *self.older):
            raise StatisticsError(
                f"'{path}' has format {content.get('format')}, this version reads {self.format}: "
                "collect it again, or update orthomerge."
            )
        if digest != fingerprint(content):
            raise ValueError("its metadata is not what was written")
        return content

    def wrote(self, path: Path) -> bool:
        """Whether a file is of this kind, by its metadata; whether it is whole is not looked at."""
        try:
            with cast(Any, safe_open(path, framework="pt")) as stream:
                return self.entry in (stream.metadata() or {})
        except (SafetensorError, OSError):
            return False


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors with their names, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        found.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()
