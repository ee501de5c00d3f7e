"""A merge written as a full model: the base's checkpoint with the updates added, streamed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from orthomerge.adapters.architecture import (
    CONFIG,
    Architecture,
    Names,
    architecture_of,
    key_of,
    missing_prefix,
    read_config,
    untied,
)
from orthomerge.adapters.checkpoint import index_of, partition, read_checkpoint
from orthomerge.adapters.experts import place_of
from orthomerge.adapters.quantized import (
    packed_again,
    packed_weights,
    plain_tensors,
    require_repackable,
)
from orthomerge.adapters.sums import Count, Part, UpdateOf, add_biases, check_floats, summed
from orthomerge.errors import AdapterError
from orthomerge.io.documents import is_object
from orthomerge.io.files import atomic_path, copy_inside, write_json
from orthomerge.io.names import INDEX
from orthomerge.io.outputs import require_free
from orthomerge.io.tensors import Held, Planned, Stored, shapes_of, write_tensors
from orthomerge.io.units import parse_size

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ckpt)(\.index\.json)?$")

# The card, and what AutoGPTQ and AutoAWQ say of weights beside the configuration.
_NOT_COPIED = ("README.md", "quantize_config.json", "quant_config.json")


def save_full_model(
    output: str | Path,
    base: str | Path,
    update_of: UpdateOf,
    *,
    names: Sequence[str],
    max_shard_size: int | str | None = None,
    requantize: Callable[[str, float], None] | None = None,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    readme: str | None = None,
    modules: Mapping[str, Tensor] | None = None,
    copies: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    parameters: Mapping[str, int] | None = None,
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
    (Conv1D, embeddings) it is transposed. Names are found in the checkpoint as Transformers does,
    with or without the model's `base_model_prefix`. Where a changed weight is tied to another, both
    are written and the tie is undone in the configuration: a change belongs to one of them. Where
    tokens were added, the configuration's `vocab_size` follows.

    The experts of a layer may lie in the checkpoint as one tensor or each on its own, as
    Transformers reads both.

    A quantized base is read as plain weights, a layer at a time (`packed_weights`), and the result
    is a model of its 16-bit type; with `requantize`, what bitsandbytes quantized is so again.

    Args:
        output: a folder that does not exist or is empty; complete or absent, whatever happens.
        base: a folder with `config.json` and safetensors, in one file or in shards.
        update_of: the update of a layer, or None where it stays as it is.
        names: the layers to ask for; all must be in the checkpoint.
        max_shard_size: bytes, or a string such as "5GB", to cut the shards anew.
        requantize: quantize changed weights as the base's are (bitsandbytes' alone); it is called
            with each layer and its relative error. The others stay as they are, byte for byte.
        overwrite: replace a folder that orthomerge wrote, known by the record that `finish` seals.
        extra: JSON files to write beside, by name.
        readme: the text of README.md.
        modules: whole tensors by name (a head) that replace the checkpoint's or are added to it.
        copies: the base's own embeddings by name, with rows for added tokens.
        biases: what is added to the biases of layers, `[d_out]` a layer (LoRA's `lora_bias`).
        parameters: the tensors of experts among the layers, with the number of experts of each.
        config: keys of `config.json` to change, as `architectures` and `id2label` for a new head.
        progress: called with the number of layers done and their total.
        finish: called with the folder once all else is in it, before it is seen at `output`.

    Raises:
        AdapterError: no such checkpoint, or one of pickles; a layer it does not have, or has in
            another shape or not as floats; weights tied in a way that cannot be undone; tokens
            added to one of the two embeddings; or a disk that is too small. Nothing is written
            then.
        OutputError: an output that is not free, or that contains the base or is inside it.
    """
    output, base = Path(output), Path(base)
    require_free(output, base=base, overwrite=overwrite)
    size = None if max_shard_size is None else parse_size(str(max_shard_size), AdapterError)
    checkpoint = read_checkpoint(base)
    settings = read_config(base)
    packed = packed_weights(checkpoint.tensors, settings, base)
    if requantize is not None:
        require_repackable(settings, base)
    plain = plain_tensors(checkpoint.tensors, packed, settings, "F32" if requantize else "")
    shape = architecture_of(base, settings)
    stored = _with_copies(copies or {}, plain, shape, base)
    changed = [*(place_of(name, parameters or {})[0] for name in names), *(modules or {})]
    tied = untied(map(shape.bare, changed), stored, Names(shape, stored), shape, base)
    stored |= tied or {}
    here = Names(shape, stored)
    layers = _changes(names, parameters or {}, stored, here, shape, base)
    # What is quantized again is summed twice, for its codes and for their scales.
    twice = packed if requantize is not None else {}
    counts = ((1 + (key in twice)) * len([p for p in parts if p]) for key, parts in layers.items())
    report = Count(sum(counts), progress)
    # The parts of one expert's matrix are written close to each other.
    cached = lru_cache(maxsize=2)(update_of) if parameters else update_of
    planned = {
        key: summed(item, layers[key], cached, _transposed(shape, key), report)
        if key in layers
        else Planned.copy(item)
        for key, item in stored.items()
    }
    check_floats(stored, layers, base)
    add_biases(planned, stored, biases or {}, here, base)
    _put_modules(planned, modules or {}, here, layers)
    ends = [f"{end}.weight" for end in shape.ends if end is not None] + list(copies or ())
    ends = [key for end in ends if (key := here.find(end)) is not None]
    changes = {
        **_vocabulary(settings, plain, planned, ends),
        **({"tie_word_embeddings": False} if tied is not None else {}),
        **(config or {}),
    }
    home = {key: checkpoint.file(key) for key in checkpoint.tensors}
    home |= {key: checkpoint.file(item.keys[0]) for key, item in packed.items()}
    rename = missing_prefix(plain, planned, shape)
    if requantize is not None:
        for key, item in packed.items():
            name = key.removesuffix(".weight")
            tell = partial(requantize, name) if key in layers else None
            planned |= packed_again(key, planned.pop(key), item, checkpoint.tensors, tell)
    else:
        settings.pop("quantization_config", None)
    planned = {rename(key): item for key, item in planned.items()}
    files = partition(planned, {rename(key): file for key, file in home.items()}, size)
    _check_room(output, sum(item.size for item in planned.values()))
    with atomic_path(output) as folder:
        _copy_others(base, folder)
        if changes or packed:
            write_json(folder / CONFIG, {**settings, **changes})
        for file, keys in files.items():
            write_tensors(folder / file, {key: planned[key] for key in keys})
        if len(files) > 1:
            write_json(folder / INDEX, index_of(files, planned))
        for name, content in (extra or {}).items():
            write_json(folder / name, content)
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")
        if finish is not None:
            finish(folder)
    return output


def _transposed(shape: Architecture, key: str) -> bool:
    part = shape.expert_part(key)
    return shape.transposes(key if part is None else part.tensor)


def _changes(
    names: Sequence[str],
    parameters: Mapping[str, int],
    stored: Mapping[str, Stored | Held],
    here: Names,
    shape: Architecture,
    base: Path,
) -> dict[str, list[Part | None]]:
    """Which updates every tensor of the checkpoint takes, by its key.

    Raises:
        AdapterError: a layer that it does not have, or experts of another number or form.
    """
    found: dict[str, list[Part | None]] = {}
    experts: dict[str, dict[int, str]] = {}
    for name in names:
        tensor, number = place_of(name, parameters)
        if number is None:
            found[key_of(name, here, base)] = [Part(name)]
        else:
            experts.setdefault(tensor, {})[number] = name
    keys: dict[str, dict[tuple[int, int], str]] = {}
    places: dict[str, int] = {}
    for key in stored if experts else ():
        if (part := shape.expert_part(key)) is not None:
            keys.setdefault(part.tensor, {})[part.expert, part.place] = key
            places[part.tensor] = part.places
    for tensor, layers in experts.items():
        count, key = parameters[tensor], here.find(tensor)
        own = shape.own_key(tensor) or tensor
        matrices = keys.get(own, {})
        has = len(matrices) // places.get(own, 1) if key is None else stored[key].shape[0]
        if has != count or (key is not None and len(stored[key].shape) != 3):
            raise AdapterError(
                f"'{base}' has {has} experts for '{tensor}', of {count} in the adapters, or keeps "
                "them in a form that is not known here: name the base model that they were trained "
                "on, or write the merge as an adapter."
            )
        if key is not None:
            found[key] = [Part(layers[i]) if i in layers else None for i in range(count)]
            continue
        for number, layer in layers.items():
            first = 0
            for place in sorted(place for expert, place in matrices if expert == number):
                matrix = matrices[number, place]
                end = first + stored[matrix].shape[0]
                found[matrix] = [Part(layer, slice(first, end))]
                first = end
    return found


def _with_copies(
    copies: Mapping[str, Tensor],
    stored: Mapping[str, Stored | Held],
    shape: Architecture,
    base: Path,
) -> dict[str, Stored | Held]:
    """The checkpoint's tensors with the adapters' copies of the embeddings in their place.

    A copy of one end of a tie is of the other, too, whichever the checkpoint holds.
    """
    here = Names(shape, stored)
    other_end = {shape.bare(target): source for target, source in shape.ties}
    found: dict[str, Stored | Held] = dict(stored)
    for name, rows in shapes_of(copies).items():
        key = here.find(name) or here.find(other_end.get(shape.bare(name), name))
        if key is None or stored[key].shape[1:] != rows[1:]:
            raise AdapterError(
                f"the adapters bring '{name}' as {list(rows)}, which '{base}' has "
                f"{'not' if key is None else f'as {list(stored[key].shape)}'}: name the base model "
                "that they were trained on."
            )
        found[key] = Held(partial(copies.__getitem__, name), stored[key].dtype, rows)
    return found


def _vocabulary(
    settings: Mapping[str, Any],
    stored: Mapping[str, Stored | Held],
    planned: Mapping[str, Planned],
    ends: Collection[str],
) -> dict[str, Any]:
    """What `config.json` must say where tokens were added to the embeddings.

    Raises:
        AdapterError: rows were added to one end of the model and not to the other.
    """
    rows = {key: planned[key].shape[0] for key in ends}
    before = {stored[key].shape[0] for key in rows if key in stored}
    now = set(rows.values())
    if now <= before:
        return {}
    if len(now) > 1:
        listed = " and ".join(f"'{key}' {count}" for key, count in rows.items())
        raise AdapterError(
            f"the model would have different rows for its tokens ({listed}): tokens were added and "
            "only one of the two embeddings was saved; save the adapter with "
            "save_embedding_layers=True and both, or neither, among its target modules."
        )
    return _with_number(settings, "vocab_size", before, now.pop())


def _with_number(
    settings: Mapping[str, Any], key: str, before: Collection[int], now: int
) -> dict[str, Any]:
    """The entries of a configuration that change where a number does, in its parts as well."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name == key and value in before:
            found[name] = now
        elif is_object(value) and (inner := _with_number(value, key, before, now)):
            found[name] = value | inner
    return found


def _put_modules(
    planned: dict[str, Planned],
    modules: Mapping[str, Tensor],
    here: Names,
    layers: Collection[str],
) -> None:
    """Whole tensors in the place of the checkpoint's, in its dtype, or beside them in their own."""
    for name, tensor in modules.items():
        key = here.find(name) or name
        if key in layers:
            raise AdapterError(
                f"'{name}' is both a whole tensor and a layer with an update: keep one of them."
            )
        before = planned.get(key)
        planned[key] = Planned.tensor(tensor, before.dtype if before else None)


def _check_room(output: Path, size: int) -> None:
    place = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise AdapterError(
            f"the model needs {size / 2**30:.1f} GiB and '{place}' has {free / 2**30:.1f} GiB "
            "free: choose another output folder."
        )


def _copy_others(base: Path, folder: Path) -> None:
    """Make `folder`, with every file of the base but weights and the card."""
    folder.mkdir()
    for path in sorted(base.iterdir()):
        if path.name.startswith(".") or path.name in _NOT_COPIED or _WEIGHTS.search(path.name):
            continue
        if path.is_file():
            copy_inside(path, folder / path.name, base)
        elif path.name == "additional_chat_templates":
            (folder / path.name).mkdir()
            for template in sorted(p for p in path.iterdir() if p.is_file()):
                copy_inside(template, folder / path.name / template.name, base)
