"""safetensors files read and written a tensor at a time: no more than one is in memory.

A file is `length (8 bytes, little-endian) | header (JSON) | tensors, one after the other`, so that
sizes are known before a tensor is read, and a header can be written before a tensor is computed
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orthomerge.errors import AdapterError
from orthomerge.io.documents import parse_json
from orthomerge.io.files import remember_sha256

BLOCK = 4 * 2**20
"""Bytes read at once: few enough that what is worked out from them stays in the cache."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
_FORMAT = {"format": "pt"}
_ENTRY = 160  # more than the header says of one tensor, without its name


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a tensor lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin

    def matrix(self, place: int) -> Stored:
        """Where one matrix of a tensor of such lies."""
        return replace(self.rows(place, place + 1), shape=self.shape[1:])

    def rows(self, first: int, end: int) -> Stored:
        """Where some of its rows lie, those of the first dimension."""
        size = self.size // self.shape[0]
        return replace(
            self,
            shape=(end - first, *self.shape[1:]),
            begin=self.begin + first * size,
            end=self.begin + end * size,
        )

    def chunks(self) -> Iterator[bytes]:
        """Its bytes as they are, a block at a time."""
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            left = self.end - self.begin
            while left:
                chunk = _exactly(stream, min(left, BLOCK), self.path)
                left -= len(chunk)
                yield chunk

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of a matrix, `[rows, columns]`, in the stored dtype."""
        rows, columns = self.shape
        dtype = DTYPES[self.dtype]
        row_bytes = columns * dtype.itemsize
        step = max(1, BLOCK // max(row_bytes, 1))
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                chunk = bytearray(
                    _exactly(stream, count * row_bytes, self.path)
                )  # writable, as torch asks
                yield (
                    slice(first, first + count),
                    torch.frombuffer(chunk, dtype=dtype).view(count, columns),
                )


@dataclass(frozen=True)
class Held:
    """A tensor from elsewhere in the place of a stored one, made when it is its turn."""

    make: Callable[[], Tensor]
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[Any]:
        """Its bytes in the stored dtype."""
        yield as_bytes(self.make().to(DTYPES[self.dtype]))

    def matrix(self, place: int) -> Held:
        """One matrix of a tensor of such."""
        return Held(lambda: self.make()[place], self.dtype, self.shape[1:])

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows of a matrix as one block."""
        yield slice(0, self.shape[0]), self.make().clone()


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its header, and where its bytes come from when it is its turn."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterable[Any]]

    @classmethod
    def copy(cls, stored: Stored | Held) -> Planned:
        """The stored tensor as it is."""
        return cls(stored.dtype, stored.shape, stored.size, stored.chunks)

    @classmethod
    def tensor(cls, tensor: Tensor, dtype: str | None = None) -> Planned:
        """A tensor in memory, cast to `dtype` where one is given."""
        name = dtype or NAMES.get(tensor.dtype)
        if name is None:
            raise AdapterError(f"a tensor of type {tensor.dtype} cannot be written: cast it first.")
        size = tensor.numel() * DTYPES[name].itemsize
        return cls(
            name, tuple(tensor.shape), size, lambda: [as_bytes(tensor.detach().to(DTYPES[name]))]
        )

    @property
    def item_size(self) -> int:
        """Bytes of one value."""
        return self.size // max(math.prod(self.shape), 1)


def as_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        AdapterError: the file is cut or no safetensors.
    """
    try:
        with safe_open(path, framework="pt"):  # the library checks the header and the file's size
            pass
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = parse_json(stream.read(length).decode("utf-8"))
    except (SafetensorError, OSError, ValueError, struct.error) as problem:
        raise AdapterError(
            f"'{path}' cannot be read as safetensors ({problem}): copy the base model anew."
        ) from problem
    header.pop("__metadata__", None)
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    start = 8 + length
    return {
        key: Stored(
            path,
            value["dtype"],
            tuple(value["shape"]),
            start + value["data_offsets"][0],
            start + value["data_offsets"][1],
        )
        for key, value in ordered
    }


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a file says beside its tensors.

    Raises:
        AdapterError: the file is cut or no safetensors.
    """
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:  # its package states no types
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as problem:
        raise AdapterError(f"'{path}' cannot be read as safetensors ({problem}).") from problem


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
        """Those tensors that are named, under other names, by those they have."""
        entries = {new: self._entries[old] for old, new in names.items()}
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
    """The named tensors under other names; those of a file are still read when asked for."""
    if isinstance(tensors, LazyTensors):
        return tensors.renamed(names)
    return {new: tensors[old] for old, new in names.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each, without reading what is in a file."""
    if isinstance(tensors, LazyTensors):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Planned | Tensor],
    metadata: Mapping[str, str] = _FORMAT,
) -> str:
    """Write tensors of known sizes, each computed when its turn comes; returns the SHA-256.

    Raises:
        AdapterError: a tensor whose bytes are not as many as its shape says, or of a type that
            safetensors files of ours do not have.
    """
    planned = {n: t if isinstance(t, Planned) else Planned.tensor(t) for n, t in tensors.items()}
    # Wide types first, so that every tensor is aligned.
    ordered = sorted(planned.items(), key=lambda item: -item[1].item_size)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, item in ordered:
        start, end = end, end + item.size
        header[name] = _entry(item.dtype, item.shape, start, end)
    text = _compact(header)
    text += b" " * (-len(text) % 8)
    found = hashlib.sha256()
    with path.open("wb") as stream:

        def put(data: Any) -> int:
            found.update(data)
            return stream.write(data)

        put(struct.pack("<Q", len(text)) + text)
        for name, item in ordered:
            written = sum(put(chunk) for chunk in item.chunks())
            if written != item.size:
                raise AdapterError(f"'{name}' came as {written} bytes, not {item.size}.")
    remember_sha256(path, found.hexdigest())
    return found.hexdigest()


class TensorWriter:
    """A file of tensors whose sizes are known only when each is there, written as they come.

    `names` are all that may be added: room for the header is left before the data, and what of it
    is not needed is filled with blanks, as the format allows.
    """

    def __init__(
        self, path: Path, names: Iterable[str], metadata: Mapping[str, str] = _FORMAT
    ) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        room = len(_compact(self._header)) + sum(len(json.dumps(n)) + _ENTRY for n in names)
        self._room = room + -(8 + room) % 64
        self._end = 0
        self._stream = path.open("wb")
        self._stream.seek(8 + self._room)

    def __enter__(self) -> TensorWriter:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        item = Planned.tensor(tensor)
        start, self._end = self._end, self._end + item.size
        self._header[name] = _entry(item.dtype, item.shape, start, self._end)
        for chunk in item.chunks():
            self._stream.write(chunk)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream as stream:
            if problem is None:
                text = _compact(self._header)
                assert len(text) <= self._room, "more tensors than were announced"
                stream.seek(0)
                stream.write(struct.pack("<Q", self._room) + text.ljust(self._room))


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _compact(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _exactly(stream: BinaryIO, count: int, path: Path) -> bytes:
    chunk = stream.read(count)
    if len(chunk) != count:
        raise AdapterError(f"'{path}' ends too early: it changed while it was read.")
    return chunk
