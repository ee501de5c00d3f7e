"""safetensors files a tensor at a time: read when asked for, written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from orthomerge.adapters.checkpoint import DTYPES, NAMES, Stored, as_bytes, read_header
from orthomerge.errors import AdapterError

_ENTRY = 160  # more than the header says of one tensor, beside its name


def open_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor's name, shape, type and place, from the header alone.

    Raises:
        AdapterError: the file is not safetensors, or was cut.
    """
    try:
        return read_header(path)
    except AdapterError as problem:
        reason = str(problem.__cause__ or problem).strip().splitlines()[0].rstrip(". ")
        raise AdapterError(
            f"'{path}' cannot be read as safetensors ({reason}): it was cut, altered or never one; "
            "copy it again."
        ) from problem


def read_tensor(stored: Stored) -> Tensor:
    """One tensor, in memory of its own.

    Read and not mapped: pages of a map are counted as held, and come in one fault at a time, which
    took a hundred times as long for factors of 200 kB.

    Raises:
        AdapterError: a type that PyTorch has not, or a file that changed since it was opened.
    """
    if stored.dtype not in DTYPES:
        raise AdapterError(
            f"'{stored.path}' holds tensors of type {stored.dtype}, which cannot be read: save it "
            "in a common type."
        )
    data = bytearray(stored.end - stored.begin)
    try:
        with stored.path.open("rb") as stream:
            stream.seek(stored.begin)
            whole = stream.readinto(data) == len(data)
    except OSError as problem:
        raise AdapterError(f"'{stored.path}' cannot be read: {problem.strerror}.") from problem
    if not whole:
        raise AdapterError(f"'{stored.path}' ends too early: it changed while it was read.")
    dtype = DTYPES[stored.dtype]
    tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return tensor.reshape(stored.shape)


def require_finite(tensor: Tensor, what: str, where: str) -> Tensor:
    """The tensor, refused where a value of it is NaN or infinite.

    Raises:
        AdapterError: one is; the message names `what` of `where`.
    """
    if tensor.is_floating_point() and tensor.numel():
        least, greatest = torch.aminmax(tensor)
        if not (bool(least.isfinite()) and bool(greatest.isfinite())):  # NaN comes out of both
            raise AdapterError(
                f"{what} of '{where}' has values that are not finite: its training diverged, or it "
                "was saved in a type of too small a range; take an earlier checkpoint of it."
            )
    return tensor


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of a file by names of our own, each read when it is asked for; none is kept.

    With `source`, what an error calls the file, values that are not finite are refused.
    """

    def __init__(self, entries: Mapping[str, Stored], source: str | None = None) -> None:
        self._entries, self._source = dict(entries), source
        self.shapes = {name: stored.shape for name, stored in entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = read_tensor(self._entries[name])
        return tensor if self._source is None else require_finite(tensor, f"'{name}'", self._source)

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """The same tensors under other names, by those they have."""
        entries = {names[name]: stored for name, stored in self._entries.items()}
        return LazyTensors(entries, self._source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def renamed_tensors(
    tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> Mapping[str, Tensor]:
    """Tensors under other names, by those they have; those of a file are still read when asked."""
    if isinstance(tensors, LazyTensors):
        return tensors.renamed(names)
    return {names[name]: tensor for name, tensor in tensors.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each, without reading what lies in a file."""
    if isinstance(tensors, LazyTensors):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class TensorWriter:
    """A safetensors file written a tensor at a time, so that one tensor is in memory, not all.

    `names` are all that may be added: room for the header is left before the data, and what of it
    is not needed is filled with blanks, as the format allows.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        room = 64 + sum(len(json.dumps(name)) + _ENTRY for name in names)
        self._room = room + -(8 + room) % 64
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._stream = path.open("wb")
        self._stream.seek(8 + self._room)

    def __enter__(self) -> TensorWriter:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        data = tensor.detach().cpu().contiguous()
        start, self._end = self._end, self._end + data.numel() * data.element_size()
        self._header[name] = {
            "dtype": NAMES[data.dtype], "shape": list(data.shape),
            "data_offsets": [start, self._end],
        }  # fmt: skip
        if data.numel():
            self._stream.write(as_bytes(data))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream as stream:
            if problem is None:
                header = json.dumps(self._header, separators=(",", ":")).encode()
                assert len(header) <= self._room, "more tensors than were announced"
                stream.seek(0)
                stream.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
