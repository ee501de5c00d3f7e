"""A merge written as a full model: the base's checkpoint with the updates added, streamed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from orthomerge.adapters.checkpoint import (
    DTYPES,
    FLOATS,
    INDEX,
    Planned,
    Stored,
    as_bytes,
    index_of,
    partition,
    read_checkpoint,
    write_shard,
)
from orthomerge.adapters.tensors import read_tensor
from orthomerge.documents import read_json
from orthomerge.errors import AdapterError, nearest
from orthomerge.factors import LoraFactors
from orthomerge.files import atomic_path, copy_inside, write_json
from orthomerge.models import quiet

CONFIG = "config.json"
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ckpt)(\.index\.json)?$")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Update = LoraFactors | Tensor
UpdateOf = Callable[[str], Update | None]


def save_full_model(
    output: str | Path,
    base: str | Path,
    update_of: UpdateOf,
    *,
    names: Sequence[str],
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    readme: str | None = None,
    modules: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write `W + ΔW` for every named layer of the checkpoint `base`, the rest as it is.

    The result is an ordinary folder for `from_pretrained`: safetensors in the base's shards, an
    index where there is more than one, and the base's configuration and tokenizer. Sums are worked
    out in float32 or better and cast to the stored dtype. Tensors go from file to file a block at
    a time, and layers are asked for in the order they are written, so that memory holds one
    layer's update and a block of its weight, whatever the model's size.

    An update is `[d_out, d_in]` of the map the layer does; where weights are stored transposed
    (Conv1D, embeddings) it is turned. Names are found in the checkpoint as Transformers does it,
    with or without the model's `base_model_prefix`. Where an updated weight is tied to another,
    both are written and the tie is undone in the configuration: an update belongs to one of them.

    Args:
        output: a folder that does not exist or is empty; complete or absent, whatever happens.
        base: a folder with `config.json` and safetensors, in one file or in shards.
        update_of: the update of a layer, or None where it stays as it is.
        names: the layers to ask for; all must be in the checkpoint.
        max_shard_size: bytes, or a string such as "5GB", to cut the shards anew.
        overwrite: replace what is at `output`.
        extra: JSON files to write beside, by name.
        readme: the text of README.md.
        modules: whole tensors by name (a head) that replace the checkpoint's or are added to it.
        biases: what is added to the biases of layers, `[d_out]` a layer (LoRA's `lora_bias`).
        config: keys of `config.json` to change, as `architectures` and `id2label` for a new head.
        progress: called with the number of layers done and their total.
        finish: called with the folder once all else is in it, before it is seen at `output`.

    Raises:
        AdapterError: no such checkpoint, or one of pickles; a layer it does not have, or has in
            another shape or not as floats; weights tied in a way that cannot be undone; an output
            that is not empty, or a disk that is too small. Nothing is written then.
    """
    output, base = Path(output), Path(base)
    _check_output(output, base, overwrite)
    size = None if max_shard_size is None else _bytes(max_shard_size)
    checkpoint = read_checkpoint(base)
    settings = _read_config(base)
    shape = _architecture(base, settings)
    tied = _untied(names, checkpoint.tensors, shape, settings, base)
    changes = {**(config or {}), **({"tie_word_embeddings": False} if tied is not None else {})}
    stored = {**checkpoint.tensors, **(tied or {})}
    layers = {_key_of(name, stored, shape.prefix, base): name for name in names}
    report = _Count(len(layers), progress)
    planned = {
        key: _summed(item, layers[key], update_of, layers[key] in shape.turned, report)
        if key in layers
        else Planned.copy(item)
        for key, item in stored.items()
    }
    _check_floats(stored, layers, base)
    _add_biases(planned, stored, biases or {}, shape.prefix, base)
    _put_modules(planned, modules or {}, shape.prefix, layers)
    home = {key: checkpoint.file(key) for key in checkpoint.tensors}
    rename = _missing_prefix(checkpoint.tensors, planned, shape)
    planned = {rename(key): item for key, item in planned.items()}
    files = partition(planned, {rename(key): file for key, file in home.items()}, size)
    _check_room(output, sum(item.size for item in planned.values()))
    with atomic_path(output) as folder:
        folder.mkdir()
        _copy_others(base, folder)
        if changes:
            write_json(folder / CONFIG, {**settings, **changes})
        for file, keys in files.items():
            write_shard(folder / file, {key: planned[key] for key in keys})
        if len(files) > 1:
            write_json(folder / INDEX, index_of(files, planned))
        for name, content in (extra or {}).items():
            write_json(folder / name, content)
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")
        if finish is not None:
            finish(folder)
    return output


# ---------------------------------------------------------------------------------------------
# What goes into one tensor


@dataclass
class _Count:
    """How many layers are done."""

    total: int
    progress: Callable[[int, int], None] | None
    done: int = 0

    def one_more(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _summed(
    stored: Stored, layer: str, update_of: UpdateOf, turned: bool, count: _Count
) -> Planned:
    """`W + ΔW` of one layer, of the stored shape and dtype, worked out when it is written."""

    def pieces() -> Iterator[Any]:
        update = update_of(layer)
        yield from stored.pieces() if update is None else _sum_blocks(stored, layer, update, turned)
        count.one_more()

    return Planned(stored.dtype, stored.shape, stored.end - stored.begin, pieces)


def _sum_blocks(stored: Stored, layer: str, update: Update, turned: bool) -> Iterator[Any]:
    """Blocks of rows of `W + ΔW`, as bytes. O(rows · rank · columns) for factors."""
    dtype = DTYPES[stored.dtype]
    own = update.A.dtype if isinstance(update, LoraFactors) else update.dtype
    working = torch.promote_types(torch.promote_types(own, dtype), torch.float32)
    add = _adding(_as_stored(update, stored.shape, layer, turned), working)
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


def _add_biases(
    planned: dict[str, Planned],
    stored: Mapping[str, Stored],
    biases: Mapping[str, Tensor],
    prefix: str,
    base: Path,
) -> None:
    """`b + Δb` in the place of every named layer's bias, in its dtype."""
    for layer, bias in biases.items():
        key = _find(f"{layer}.bias", stored, prefix)
        if key is None:
            raise AdapterError(
                f"layer '{layer}' has no bias in '{base}' for the adapters' lora_bias "
                "to join: write the merge as an adapter."
            )
        _check_float(key, stored[key], base)
        before = read_tensor(stored[key])
        if before.shape != bias.shape:
            raise AdapterError(
                f"the bias of layer '{layer}' is {list(before.shape)} in '{base}' and its update "
                f"{list(bias.shape)}: the adapters belong to another base model."
            )
        working = torch.promote_types(torch.promote_types(bias.dtype, before.dtype), torch.float32)
        summed = before.to(working) + bias.to("cpu", working)
        planned[key] = Planned.tensor(summed, stored[key].dtype)


def _as_stored(update: Update, shape: tuple[int, ...], layer: str, turned: bool) -> Update:
    """The update in the orientation of the stored weight; only a square one needs `turned`."""
    found = tuple(update.shape)
    if found == shape and not (turned and found[0] == found[1]):
        return update
    if found == shape[::-1]:
        if isinstance(update, LoraFactors):
            return LoraFactors(update.B.T, update.A.T, update.scaling)
        return update.T
    raise AdapterError(
        f"layer '{layer}' is {list(shape)} in the checkpoint and its update {list(found)}: the "
        "adapters belong to another base model."
    )


def _adding(update: Update, working: torch.dtype) -> Callable[[Tensor, slice], Tensor]:
    """What adds the update's rows to a block of the weight's, in the block's own memory."""
    if isinstance(update, Tensor):
        return lambda block, rows: block.add_(update[rows].to("cpu", working))
    left = update.B.to("cpu", working) * update.scaling
    right = update.A.to("cpu", working)
    return lambda block, rows: block.addmm_(left[rows], right)


def _check_floats(stored: Mapping[str, Stored], layers: Mapping[str, str], base: Path) -> None:
    """Only a matrix of plain floats can take an update."""
    for key, layer in layers.items():
        _check_float(key, stored[key], base)
        if len(stored[key].shape) != 2:
            raise AdapterError(
                f"layer '{layer}' is {list(stored[key].shape)} in '{base}': only matrices take an "
                "update."
            )


def _check_float(key: str, item: Stored, base: Path) -> None:
    if item.dtype not in FLOATS:
        raise AdapterError(
            f"'{key}' of '{base}' is stored as {item.dtype}: an update cannot be added to "
            "quantized weights; name the base model in 16 or 32 bits."
        )


# ---------------------------------------------------------------------------------------------
# What the base is


@dataclass(frozen=True)
class _Architecture:
    """What the model's class says: its prefix, its own names, ties, and layers stored turned."""

    prefix: str = ""
    keys: frozenset[str] = frozenset()
    ties: tuple[tuple[str, str], ...] = ()
    turned: frozenset[str] = frozenset()


def _read_config(base: Path) -> dict[str, Any]:
    path = base / CONFIG
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as problem:
        raise AdapterError(
            f"no model at '{base}': its {CONFIG} cannot be read ({problem})."
        ) from problem


def _architecture(base: Path, settings: Mapping[str, Any]) -> _Architecture:
    """The class of the configuration, built without weights; nothing where it is not known."""
    try:
        with quiet(), torch.device("meta"):
            config = cast(Any, AutoConfig).from_pretrained(base, trust_remote_code=False)
            named = (settings.get("architectures") or [""])[0]
            model: Any = (
                getattr(transformers, named)(config)
                if hasattr(transformers, named)
                else cast(Any, AutoModel).from_config(config, trust_remote_code=False)
            )
    # Whatever a class raises when it is built, only its hints are lost: names then have to match
    # as they are and square weights count as stored [d_out, d_in].
    except Exception:
        return _Architecture()
    prefix = model.base_model_prefix
    turned: set[str] = {n for n, m in model.named_modules() if isinstance(m, Conv1D | nn.Embedding)}
    if prefix:
        turned |= {f"{prefix}.{n}" for n in turned} | {n.removeprefix(f"{prefix}.") for n in turned}
    return _Architecture(
        prefix,
        frozenset(model.state_dict()),
        tuple(model.all_tied_weights_keys.items()),
        frozenset(turned),
    )


def _find(name: str, keys: Collection[str], prefix: str) -> str | None:
    """The name as it is, with the prefix or without it, whichever is a key."""
    candidates = [name]
    if prefix:
        candidates += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    return next((c for c in candidates if c in keys), None)


def _key_of(layer: str, keys: Collection[str], prefix: str, base: Path) -> str:
    key = _find(f"{layer}.weight", keys, prefix)
    if key is None:
        close = nearest(f"{layer}.weight", keys)
        hint = f", the nearest is '{close}'" if close else ""
        raise AdapterError(
            f"'{base}' has no weight of layer '{layer}'{hint}: name the base model that the "
            "adapters were trained on."
        )
    return key


def _untied(
    names: Sequence[str],
    stored: Mapping[str, Stored],
    shape: _Architecture,
    settings: Mapping[str, Any],
    base: Path,
) -> dict[str, Stored] | None:
    """What the checkpoint leaves out because it is tied; None where no update touches a tie."""
    wanted = {f"{name}.weight" for name in names}
    touched = [pair for pair in shape.ties if any(_find(end, wanted, shape.prefix) for end in pair)]
    if not touched:
        return None
    sources = [source for target, source in shape.ties if target.endswith(".weight")]
    if len(set(sources)) != len(sources) or "text_config" in settings:
        raise AdapterError(
            f"'{touched[0][0]}' is tied to '{touched[0][1]}' in '{base}' in a way that cannot be "
            "undone: merge adapters that leave both alone."
        )
    found = {target: _find(source, stored, shape.prefix) for target, source in shape.ties}
    return {
        target: stored[source]
        for target, source in found.items()
        if source is not None and _find(target, stored, shape.prefix) is None
    }


def _put_modules(
    planned: dict[str, Planned],
    modules: Mapping[str, Tensor],
    prefix: str,
    layers: Collection[str],
) -> None:
    """Whole tensors in the place of the checkpoint's, in its dtype, or beside them in their own."""
    for name, tensor in modules.items():
        key = _find(name, planned, prefix) or name
        if key in layers:
            raise AdapterError(
                f"'{name}' is both a whole tensor and a layer with an update: keep one of them."
            )
        before = planned.get(key)
        planned[key] = Planned.tensor(tensor, before.dtype if before else None)


def _missing_prefix(
    stored: Mapping[str, Stored], planned: Mapping[str, Planned], shape: _Architecture
) -> Callable[[str], str]:
    """How keys are called in the output: with the prefix where a head joins a bare trunk.

    A checkpoint of the trunk alone has no prefix, and is read as the trunk; with a head beside it,
    it has to be one of the whole model.
    """
    added = [key for key in planned if key not in stored]
    start = f"{shape.prefix}."
    fits = all(key in shape.keys for key in added) and any(key in shape.keys for key in stored)
    bare = shape.prefix and added and not any(key.startswith(start) for key in planned)
    if not bare or fits:
        return str
    return partial(_with_prefix, start, frozenset(stored))


def _with_prefix(start: str, trunk: frozenset[str], key: str) -> str:
    return start + key if key in trunk else key


# ---------------------------------------------------------------------------------------------
# The folder


def _check_output(output: Path, base: Path, overwrite: bool) -> None:
    if output.is_dir() and output.resolve() == base.resolve():
        raise AdapterError(f"'{output}' is the base model itself: choose another output folder.")
    if output.exists() and not output.is_dir():
        raise AdapterError(f"'{output}' is a file: choose another output folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise AdapterError(
            f"'{output}' is not empty: choose another output folder, or overwrite it."
        )


def _check_room(output: Path, size: int) -> None:
    place = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise AdapterError(
            f"the model needs {size / 2**30:.1f} GiB and '{place}' has {free / 2**30:.1f} GiB "
            "free: choose another output folder."
        )


def _copy_others(base: Path, folder: Path) -> None:
    """Configuration, tokenizer, templates, licence: every file but weights and the base's card."""
    for path in sorted(base.iterdir()):
        if path.name.startswith(".") or path.name == "README.md" or _WEIGHTS.search(path.name):
            continue
        if path.is_file():
            copy_inside(path, folder / path.name, base)
        elif path.name == "additional_chat_templates":
            (folder / path.name).mkdir()
            for template in sorted(p for p in path.iterdir() if p.is_file()):
                copy_inside(template, folder / path.name / template.name, base)


def _bytes(size: int | str) -> int:
    """A size in bytes, from a number or a string such as "5GB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", str(size).upper())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value < 1:
        raise AdapterError(f"'{size}' is no size of a shard: give bytes, or a string as '5GB'.")
    return value
