"""A model folder's weights: which file holds which tensor, read and planned anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthomerge.errors import AdapterError
from orthomerge.io.documents import Unreadable, read_index
from orthomerge.io.names import INDEX, MODEL
from orthomerge.io.tensors import Planned, Stored, read_header


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by key, and the file of each, in the order of the files."""

    folder: Path
    tensors: dict[str, Stored]

    def file(self, key: str) -> str:
        """The name of the file that holds a tensor."""
        return self.tensors[key].path.name


def read_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a model folder's safetensors files; no tensor is read.

    Raises:
        AdapterError: no weights in safetensors there, or files that are cut or not as indexed.
    """
    index = folder / INDEX
    if (folder / MODEL).is_file():
        return Checkpoint(folder, read_header(folder / MODEL))
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
        f"no model at '{folder}': it has neither {MODEL} nor {INDEX}; name a folder that "
        "save_pretrained wrote."
    )


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
    from huggingface_hub import split_torch_state_dict_into_shards

    # Sizes are all that counts, of whatever type: tensors without memory stand for them.
    sizes = {
        key: torch.empty(planned.size, dtype=torch.uint8, device="meta")
        for key, planned in tensors.items()
    }
    return split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_size
    ).filename_to_tensors


def index_of(files: Mapping[str, Sequence[str]], tensors: Mapping[str, Planned]) -> dict[str, Any]:
    """The index of a sharded checkpoint."""
    return {
        "metadata": {
            "total_parameters": sum(math.prod(t.shape) for t in tensors.values()),
            "total_size": sum(t.size for t in tensors.values()),
        },
        "weight_map": {key: file for file, keys in files.items() for key in sorted(keys)},
    }
