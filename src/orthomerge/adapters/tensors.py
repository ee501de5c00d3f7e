"""safetensors files a tensor at a time: read when asked for, written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orthomerge.errors import AdapterError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ENTRY = 160  # more than the header says of one tensor, beside its name


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file; what is wrong with it is an `AdapterError` that names it."""
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except (SafetensorError, OSError, ValueError) as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(". ")
        raise AdapterError(
            f"'{path}' cannot be read as safetensors ({reason}): it was cut, altered or never one; "
            "copy it again."
        ) from problem


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, from the header alone.

    Raises:
        AdapterError: the file is not safetensors, or was cut.
    """
    with _opened(path) as stream:
        return {key: tuple(stream.get_slice(key).get_shape()) for key in stream.keys()}  # noqa: SIM118


def read_tensors(path: Path, keys: Iterable[str]) -> list[Tensor]:
    """The named tensors, copied, so that the file is not held in memory behind them.

    The file is opened anew each time: an open one keeps every page that was read mapped.

    Raises:
        AdapterError: the file is not safetensors, was cut, or lacks a tensor.
    """
    with _opened(path) as stream:
        return [stream.get_tensor(key).clone() for key in keys]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of a file by names of our own, each read when it is asked for; none is kept."""

    def __init__(self, path: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]):
        self._path = path
        self._keys = dict(keys)
        self.shapes = {name: shapes[key] for name, key in keys.items()}

    def __getitem__(self, name: str) -> Tensor:
        return read_tensors(self._path, [self._keys[name]])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


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
            "dtype": _NAMES[data.dtype], "shape": list(data.shape),
            "data_offsets": [start, self._end],
        }  # fmt: skip
        if data.numel():
            self._stream.write(data.reshape(-1).view(torch.uint8).numpy().data)

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
