"""Safetensors checkpoints read and written a piece at a time: no more than a block is in memory.

The layout of a file is `length (8 bytes, little-endian) | header (JSON) | tensors, one after the
other`, so that sizes are known before a single tensor is read, and a header can be written before
a single tensor is computed (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, parse_json, read_index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a tensor lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes as they are, a block at a time."""
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            left = self.end - self.begin
            while left:
                piece = _exactly(stream, min(left, BLOCK), self.path)
                left -= len(piece)
                yield piece

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
                piece = bytearray(
                    _exactly(stream, count * row_bytes, self.path)
                )  # writable, as torch asks
                yield (
                    slice(first, first + count),
                    torch.frombuffer(piece, dtype=dtype).view(count, columns),
                )


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its header, and where its bytes come from when it is its turn."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    pieces: Callable[[], Iterable[Any]]

    @classmethod
    def copy(cls, stored: Stored) -> Planned:
        """The stored tensor as it is."""
        return cls(stored.dtype, stored.shape, stored.end - stored.begin, stored.pieces)

    @classmethod
    def tensor(cls, tensor: Tensor, dtype: str | None = None) -> Planned:
        """A tensor in memory, cast to `dtype` where one is given."""
        name = dtype or NAMES[tensor.dtype]
        size = tensor.numel() * DTYPES[name].itemsize
        return cls(
            name, tuple(tensor.shape), size, lambda: [as_bytes(tensor.detach().to(DTYPES[name]))]
        )


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by key, and the file of each, in the order of the files."""

    folder: Path
    tensors: dict[str, Stored]

    def file(self, key: str) -> str:
        """The name of the file that holds a tensor."""
        return self.tensors[key].path.name


def as_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a model folder's safetensors files; no tensor is read.

    Raises:
        AdapterError: no weights in safetensors there, or files that are cut or not as indexed.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return Checkpoint(folder, read_header(folder / SINGLE))
    if not index.is_file():
        raise _no_weights(folder)
    try:
        by_key = read_index(index)
    except (Unreadable, OSError) as problem:
        raise AdapterError(
            f"'{index}' cannot be read as an index of shards ({problem}): copy the base model anew."
        ) from problem
    tensors: dict[str, Stored] = {}
    for file in sorted(set(by_key.values())):
        if not (folder / file).is_file():
            raise AdapterError(
                f"'{index}' names the shard '{file}', which '{folder}' does not hold."
            )
        tensors.update(read_header(folder / file))
    if absent := sorted(set(by_key) - set(tensors)):
        raise AdapterError(f"'{index}' names '{absent[0]}', which no shard of '{folder}' holds.")
    return Checkpoint(folder, tensors)


def _no_weights(folder: Path) -> AdapterError:
    if any(folder.glob("pytorch_model*.bin*")):
        return AdapterError(
            f"'{folder}' holds pickled weights (pytorch_model.bin), which are never read: load it "
            "once in Transformers and save it with save_pretrained to get safetensors."
        )
    return AdapterError(
        f"no model at '{folder}': it has neither {SINGLE} nor {INDEX}; name a folder that "
        "save_pretrained wrote."
    )


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


def write_shard(path: Path, tensors: Mapping[str, Planned]) -> None:
    """Write one file, tensor by tensor; each is computed when its turn comes.

    Raises:
        AdapterError: a tensor whose bytes are not as many as its shape says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide types first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -_itemsize(item[1]))
    at = 0
    for key, planned in ordered:
        header[key] = {
            "dtype": planned.dtype,
            "shape": list(planned.shape),
            "data_offsets": [at, at + planned.size],
        }
        at += planned.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key, planned in ordered:
            written = sum(stream.write(piece) for piece in planned.pieces())
            if written != planned.size:
                raise AdapterError(f"'{key}' came as {written} bytes, not {planned.size}.")


def partition(
    tensors: Mapping[str, Planned], files: Mapping[str, str], max_size: int | None
) -> dict[str, list[str]]:
    """Which keys go into which file: those of `files`, or new ones of at most `max_size` bytes.

    A tensor above `max_size` gets a file of its own. Keys that `files` lacks join the last file.
    """
    if max_size is None:
        kept: dict[str, list[str]] = {name: [] for name in sorted(set(files.values()))}
        for key in tensors:
            kept[files.get(key) or list(kept)[-1]].append(key)
        return kept
    groups: list[list[str]] = [[]]
    room = max_size
    for key, planned in tensors.items():
        if groups[-1] and planned.size > room:
            groups.append([])
            room = max_size
        groups[-1].append(key)
        room -= planned.size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    total = len(groups)
    return {
        f"model-{n:05d}-of-{total:05d}.safetensors": keys for n, keys in enumerate(groups, start=1)
    }


def index_of(files: Mapping[str, Sequence[str]], tensors: Mapping[str, Planned]) -> dict[str, Any]:
    """The index of a sharded checkpoint."""
    return {
        "metadata": {
            "total_parameters": sum(math.prod(t.shape) for t in tensors.values()),
            "total_size": sum(t.size for t in tensors.values()),
        },
        "weight_map": {key: file for file, keys in files.items() for key in sorted(keys)},
    }


def _itemsize(planned: Planned) -> int:
    return planned.size // max(math.prod(planned.shape), 1)


def _exactly(stream: BinaryIO, count: int, path: Path) -> bytes:
    piece = stream.read(count)
    if len(piece) != count:
        raise AdapterError(f"'{path}' ends too early: it changed while it was read.")
    return piece
