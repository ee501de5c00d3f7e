"""`W + ΔW` of a checkpoint's tensors, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthomerge.adapters.architecture import Names
from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors
from orthomerge.io.tensors import DTYPES, FLOATS, Held, Planned, Stored, as_bytes, read_tensor

Update = LoraFactors | Tensor
UpdateOf = Callable[[str], Update | None]
Tensors = Mapping[str, Stored | Held]


@dataclass
class Count:
    """How many layers are done."""

    total: int
    progress: Callable[[int, int], None] | None
    done: int = 0

    def one_more(self) -> None:
        """Count a layer, and tell."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class Part(NamedTuple):
    """The update that a matrix takes: a layer's, or some of its rows where it holds those alone."""

    layer: str
    rows: slice | None = None

    def of(self, update_of: UpdateOf) -> Update | None:
        """The update."""
        update = update_of(self.layer)
        if self.rows is None or update is None:
            return update
        if isinstance(update, LoraFactors):
            return LoraFactors(update.A, update.B[self.rows], update.scaling)
        return update[self.rows]


def summed(
    stored: Stored | Held,
    parts: Sequence[Part | None],
    update_of: UpdateOf,
    transposed: bool,
    count: Count,
) -> Planned:
    """`W + ΔW` of one layer, or of each matrix of a tensor of experts, in the stored dtype.

    It is worked out when it is written.
    """

    def chunks() -> Iterator[Any]:
        for place, part in enumerate(parts):
            matrix = stored if len(parts) == 1 else stored.matrix(place)
            update = None if part is None else part.of(update_of)
            if part is None or update is None:
                yield from matrix.chunks()
            else:
                yield from _sum_blocks(matrix, part.layer, update, transposed)
            if part is not None:
                count.one_more()

    return Planned(stored.dtype, stored.shape, stored.size, chunks)


def _sum_blocks(
    stored: Stored | Held, layer: str, update: Update, transposed: bool
) -> Iterator[Any]:
    """Blocks of rows of `W + ΔW`, as bytes. O(rows · rank · columns) for factors."""
    if len(stored.shape) > 2:  # a convolution's
        stored = replace(stored, shape=(stored.shape[0], prod(stored.shape[1:])))
    dtype = DTYPES[stored.dtype]
    own = update.A.dtype if isinstance(update, LoraFactors) else update.dtype
    working = torch.promote_types(torch.promote_types(own, dtype), torch.float32)
    add = _adding(_as_stored(update, stored.shape, layer, transposed), working)
    most = torch.finfo(dtype).max
    for rows, block in stored.row_blocks():
        result = add(block.to(working), rows)
        least, greatest = torch.aminmax(result)
        if not (least >= -most and greatest <= most):  # nor where it is not a number
            raise AdapterError(
                f"layer '{layer}' is not finite in {stored.dtype} after the merge: lower the "
                "weights, or save the base model in a dtype of more range."
            )
        yield as_bytes(result.to(dtype))


def add_biases(
    planned: dict[str, Planned],
    stored: Tensors,
    biases: Mapping[str, Tensor],
    names: Names,
    base: Path,
) -> None:
    """`b + Δb` in the place of every named layer's bias, in its dtype."""
    for layer, bias in biases.items():
        key = names.find(f"{layer}.bias")
        if key is None:
            raise AdapterError(
                f"layer '{layer}' has no bias in '{base}' for the adapters' lora_bias "
                "to join: write the merge as an adapter."
            )
        _check_float(key, stored[key], base)
        item = stored[key]
        before = item.make() if isinstance(item, Held) else read_tensor(item)
        if before.shape != bias.shape:
            raise AdapterError(
                f"the bias of layer '{layer}' is {list(before.shape)} in '{base}' and its update "
                f"{list(bias.shape)}: the adapters belong to another base model."
            )
        working = torch.promote_types(torch.promote_types(bias.dtype, before.dtype), torch.float32)
        summed = before.to(working) + bias.to("cpu", working)
        planned[key] = Planned.tensor(summed, stored[key].dtype)


def _as_stored(update: Update, shape: tuple[int, ...], layer: str, transposed: bool) -> Update:
    """The update in the orientation of the stored weight; only a square one needs `transposed`."""
    found = tuple(update.shape)
    if found == shape and not (transposed and found[0] == found[1]):
        return update
    if found == shape[::-1]:
        if isinstance(update, LoraFactors):
            return LoraFactors(update.B.T, update.A.T, update.scaling)
        return update.T
    raise AdapterError(
        f"layer '{layer}' is {list(shape)} in the checkpoint and its update {list(found)}: the "
        "adapters belong to another base model, or were saved without the rows of the tokens that "
        "were added (save_embedding_layers=True)."
    )


def _adding(update: Update, working: torch.dtype) -> Callable[[Tensor, slice], Tensor]:
    """What adds the update's rows to a block of the weight's, in the block's own memory."""
    if isinstance(update, Tensor):
        return lambda block, rows: block.add_(update[rows].to("cpu", working))
    left = update.B.to("cpu", working) * update.scaling
    right = update.A.to("cpu", working)
    return lambda block, rows: block.addmm_(left[rows], right)


def check_floats(stored: Tensors, changes: Mapping[str, Sequence[Part | None]], base: Path) -> None:
    """Only a matrix, a convolution or experts of plain floats can take an update."""
    for key, parts in changes.items():
        _check_float(key, stored[key], base)
        if len(stored[key].shape) < 2:
            layer = next(part.layer for part in parts if part is not None)
            raise AdapterError(
                f"layer '{layer}' is {list(stored[key].shape)} in '{base}': only matrices and "
                "convolutions take an update."
            )


def _check_float(key: str, item: Stored | Held, base: Path) -> None:
    if item.dtype not in FLOATS:
        raise AdapterError(
            f"'{key}' of '{base}' is stored as {item.dtype}: an update cannot be added to "
            "quantized weights; name the base model in 16 or 32 bits."
        )
