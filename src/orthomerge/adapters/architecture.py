"""What a base checkpoint is: its class, the names of its tensors, what is tied, what is turned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from orthomerge.adapters.checkpoint import (
    Planned,
    Stored,
)
from orthomerge.errors import AdapterError, nearest
from orthomerge.io.documents import is_object, read_json
from orthomerge.models.loading import quiet

CONFIG = "config.json"


@dataclass(frozen=True)
class Architecture:
    """What the model's class says: its prefix, its own names, ties, and layers stored turned."""

    prefix: str = ""
    keys: frozenset[str] = frozenset()
    ties: tuple[tuple[str, str], ...] = ()
    turned: frozenset[str] = frozenset()


def read_config(base: Path) -> dict[str, Any]:
    """The base's `config.json`.

    Raises:
        AdapterError: there is none that can be read.
    """
    path = base / CONFIG
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as problem:
        raise AdapterError(
            f"no model at '{base}': its {CONFIG} cannot be read ({problem})."
        ) from problem


def refuse_quantized(settings: Mapping[str, Any], base: Path) -> None:
    """Refuse a base whose weights are packed: an update cannot be added to them.

    Raises:
        AdapterError: its configuration says that it is quantized.
    """
    packed = settings.get("quantization_config")
    if packed:
        how = packed.get("quant_method") if is_object(packed) else packed
        raise AdapterError(
            f"the base model '{base}' is quantized ({how}), so no update can be added to its "
            "weights: name the base in 16 or 32 bits with --base (base=...), or write the merge as "
            "an adapter, which loads on either."
        )


def architecture_of(base: Path, settings: Mapping[str, Any]) -> Architecture:
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
        return Architecture()
    prefix = model.base_model_prefix
    turned: set[str] = {n for n, m in model.named_modules() if isinstance(m, Conv1D | nn.Embedding)}
    if prefix:
        turned |= {f"{prefix}.{n}" for n in turned} | {n.removeprefix(f"{prefix}.") for n in turned}
    return Architecture(
        prefix,
        frozenset(model.state_dict()),
        tuple(model.all_tied_weights_keys.items()),
        frozenset(turned),
    )


def find_key(name: str, keys: Collection[str], prefix: str) -> str | None:
    """The name as it is, with the prefix or without it, whichever is a key."""
    candidates = [name]
    if prefix:
        candidates += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    return next((c for c in candidates if c in keys), None)


def key_of(layer: str, keys: Collection[str], prefix: str, base: Path) -> str:
    """The name of a layer's weight in the checkpoint.

    Raises:
        AdapterError: it has none; the message names the nearest.
    """
    key = find_key(f"{layer}.weight", keys, prefix)
    if key is None:
        close = nearest(f"{layer}.weight", keys)
        hint = f", the nearest is '{close}'" if close else ""
        raise AdapterError(
            f"'{base}' has no weight of layer '{layer}'{hint}: name the base model that the "
            "adapters were trained on."
        )
    return key


def untied(
    names: Sequence[str],
    stored: Mapping[str, Stored],
    shape: Architecture,
    settings: Mapping[str, Any],
    base: Path,
) -> dict[str, Stored] | None:
    """What the checkpoint leaves out because it is tied; None where no update touches a tie."""
    wanted = {f"{name}.weight" for name in names}
    touched = [
        pair for pair in shape.ties if any(find_key(end, wanted, shape.prefix) for end in pair)
    ]
    if not touched:
        return None
    sources = [source for target, source in shape.ties if target.endswith(".weight")]
    if len(set(sources)) != len(sources) or "text_config" in settings:
        raise AdapterError(
            f"'{touched[0][0]}' is tied to '{touched[0][1]}' in '{base}' in a way that cannot be "
            "undone: merge adapters that leave both alone."
        )
    found = {target: find_key(source, stored, shape.prefix) for target, source in shape.ties}
    return {
        target: stored[source]
        for target, source in found.items()
        if source is not None and find_key(target, stored, shape.prefix) is None
    }


def missing_prefix(
    stored: Mapping[str, Stored], planned: Mapping[str, Planned], shape: Architecture
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
