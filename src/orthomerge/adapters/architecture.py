"""What a base model is: its classes, the names of its tensors, what is tied, what is transposed.

Transformers is imported where a class is built, which most merges never need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from orthomerge.errors import AdapterError, nearest
from orthomerge.io.documents import is_object, read_json
from orthomerge.io.tensors import Held, Planned, Stored
from orthomerge.models.modules import is_transposed

CONFIG = "config.json"
_HEADS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}
"""Which of Transformers' classes PEFT's task types are for."""
_OTHER_HEADS = (
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
)


class ExpertPart(NamedTuple):
    """What a checkpoint's tensor is of a tensor of experts that the class keeps as one.

    `tensor` is the class's name; the part is of one expert, and the `place`-th of the
    `places` that make up its matrix, one below the other.
    """

    tensor: str
    expert: int
    place: int
    places: int


@dataclass(frozen=True)
class Architecture:
    """What one class of a model says: its own names of tensors, and what becomes of them.

    `inner` says whether the backbone is under `prefix` in this class, as `bert.` in a classifier
    and nothing in `BertModel`. `shapes` are those of all tensors by the class's names. `renamings`
    and `converters` are Transformers' own, which turn the names of older checkpoints, and of older
    adapters, into those of the class. Empty where the class is not known.
    """

    prefix: str = ""
    inner: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    ties: tuple[tuple[str, str], ...] = ()
    transposed: frozenset[str] = frozenset()
    renamings: tuple[Any, ...] = ()
    converters: tuple[Any, ...] = ()
    called: str = ""
    ends: tuple[str | None, str | None] = (None, None)
    """The names of the input and of the output embeddings."""
    linear: frozenset[str] = frozenset()
    """The names of the layers `x W`: Linear and Conv1D."""

    @property
    def known(self) -> bool:
        """Whether the class could be built."""
        return bool(self.shapes)

    def own_key(self, key: str) -> str | None:
        """What the class calls a tensor, by whatever name of it; None where it has no such."""
        return next((c for c in self._candidates(key) if c in self.shapes), None)

    def _candidates(self, key: str) -> Iterator[str]:
        start = f"{self.prefix}."
        yield key
        if self.prefix:
            yield start + key
            yield key.removeprefix(start)
        renamed = self.renamed(key)
        yield renamed
        if self.prefix:
            yield start + renamed
            yield renamed.removeprefix(start)
            yield self.renamed(start + key)

    def transposes(self, key: str) -> bool:
        """Whether the class keeps a weight as `[d_in, d_out]`: Conv1D, embeddings, some experts."""
        return self.own_key(key) in self.transposed

    def renamed(self, key: str) -> str:
        """The key after Transformers' renamings of older checkpoints."""
        for renaming in self.renamings:
            key = renaming.rename_source_key(key)[0]
        return key

    def fuses(self, key: str) -> bool:
        """Whether the class keeps this tensor of a checkpoint together with others as one."""
        renamed = self.renamed(key)
        return any(c.rename_source_key(renamed)[1] is not None for c in self.converters)

    def expert_part(self, key: str) -> ExpertPart | None:
        """Which part of a tensor of experts a checkpoint's tensor is; None where it is none.

        Nor where Transformers puts it together in another way than expert by expert.
        """
        from transformers.core_model_loading import Concatenate, MergeModulelist

        renamed = self.renamed(key)
        for converter in self.converters:
            target, pattern = converter.rename_source_key(renamed)
            own = None if pattern is None else self.own_key(target)
            number = re.search(str(pattern).replace("*.", r"(\d+)\."), renamed)
            if own is None or number is None or not number.groups():
                continue
            several = len(converter.source_patterns) > 1
            made: list[Any] = [
                (type(step), getattr(step, "dim", None)) for step in converter.operations
            ]
            if made == [(MergeModulelist, 0)] + [(Concatenate, 1)] * several and not (
                several and own in self.transposed
            ):
                place = converter.source_patterns.index(pattern)
                return ExpertPart(own, int(number[1]), place, len(converter.source_patterns))
        return None

    def bare(self, key: str) -> str:
        """What identifies a tensor whatever name it has: its name in the backbone.

        A name that the class does not have stays, but for the prefix.
        """
        own = self.own_key(key)
        if own is None:
            own = self.renamed(key) if self.fuses(key) else key
        return own.removeprefix(f"{self.prefix}.") if self.prefix else own

    def in_backbone(self, bare: str) -> bool:
        """Whether a bare name is of a tensor of the backbone, not of a head."""
        own = f"{self.prefix}.{bare}" if self.inner else bare
        return own in self.shapes or self.fuses(own)


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


def vocabulary_size(settings: Mapping[str, Any]) -> int | None:
    """How many rows the embeddings have, by the configuration of a model or of its text part."""
    for part in (settings, settings.get("text_config")):
        if is_object(part) and isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def architecture_of(base: Path, settings: Mapping[str, Any]) -> Architecture:
    """The class that the configuration names, built without weights; empty if it is not known."""
    config = _config_of(base)
    return Architecture() if config is None else described(_named(settings) or _backbone, config)


def task_type_of(folder: Path) -> str | None:
    """PEFT's task type of the class that a model's configuration names; None for a backbone's."""
    config, named = _config_of(folder), (read_config(folder).get("architectures") or [""])[0]
    for kind, mapping in _HEADS.items():
        if any(build.__name__ == named for build in _classes(mapping, config)):
            return kind
    return None


def architectures_of(base: Path, task_types: Iterable[str | None]) -> Iterator[Architecture]:
    """Every class that Transformers has for a base model, the likeliest first, each when asked for.

    Those of the task types come first, then the one that the configuration names, the backbone and
    all the others.
    """
    config = _config_of(base)
    if config is None:
        return
    kinds = [_HEADS[t] for t in task_types if t in _HEADS]
    named = _named(read_config(base))
    made: list[Any] = []
    for kind in (*kinds, named, _backbone, *_HEADS.values(), *_OTHER_HEADS):
        for build in _classes(kind, config) if isinstance(kind, str) else (kind,):
            if build is not None and build not in made:
                made.append(build)
                found = described(build, config)
                if found.known:
                    yield found


def _named(settings: Mapping[str, Any]) -> Any:
    """The class that a configuration names, None where Transformers has no such."""
    import transformers

    return getattr(transformers, (settings.get("architectures") or [""])[0], None)


def _classes(mapping: str, config: Any) -> tuple[Any, ...]:
    import transformers

    found: Any = getattr(transformers, mapping, {}).get(type(config), ())
    return (found,) if isinstance(found, type) else tuple(found)


def _config_of(base: Path) -> Any:
    from transformers import AutoConfig

    from orthomerge.models.loading import quiet

    try:
        with quiet():
            return cast(Any, AutoConfig).from_pretrained(base, trust_remote_code=False)
    # Whatever a configuration raises, only its hints are lost, as below.
    except Exception:
        return None


def _backbone(config: Any) -> Any:
    from transformers import AutoModel

    return cast(Any, AutoModel).from_config(config, trust_remote_code=False)


def described(build: Callable[[Any], Any], config: Any) -> Architecture:
    """What a class says of itself, built on the meta device; built once for one configuration."""
    return _described(build, config.to_json_string(use_diff=False), _Held(config))


@dataclass(frozen=True)
class _Held:
    """A configuration that takes no part in comparisons: its text does."""

    config: Any = field(compare=False)


@lru_cache(maxsize=32)
def _described(build: Callable[[Any], Any], _: str, held: _Held) -> Architecture:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    from orthomerge.models.loading import quiet

    try:
        with quiet(), torch.device("meta"):
            model: Any = build(held.config)
    # Whatever a class raises when it is built, only its hints are lost: names then have to match
    # as they are and square weights count as stored [d_out, d_in].
    except Exception:
        return Architecture()
    prefix: str = model.base_model_prefix
    modules = dict(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))
    changes: list[Any] = get_model_conversion_mapping(model)
    return Architecture(
        prefix,
        bool(prefix) and getattr(model, prefix, None) is not None,
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tuple(model.all_tied_weights_keys.items()),
        frozenset(_transposed(modules)),
        tuple(c for c in changes if isinstance(c, WeightRenaming)),
        tuple(c for c in changes if not isinstance(c, WeightRenaming)),
        type(model).__name__,
        _ends(model, modules),
        frozenset(n for n, m in modules.items() if isinstance(m, nn.Linear) or is_transposed(m)),
    )


def _transposed(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    from transformers.pytorch_utils import Conv1D

    for name, module in modules.items():
        if isinstance(module, Conv1D | nn.Embedding):
            yield f"{name}.weight"
        elif getattr(module, "is_transposed", False):  # as PEFT asks, for tensors of experts alone
            own = cast(Iterable[tuple[str, nn.Parameter]], module.named_parameters(recurse=False))
            yield from (f"{name}.{key}" for key, tensor in own if tensor.ndim == 3)


def _ends(model: Any, modules: Mapping[str, nn.Module]) -> tuple[str | None, str | None]:
    """The input and output embeddings; a model of pictures or sound may raise for want of them."""
    found: list[str | None] = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            end = get()
        except (NotImplementedError, AttributeError):
            end = None
        found.append(next((n for n, m in modules.items() if end is not None and m is end), None))
    return found[0], found[1]


class Names:
    """The tensors of a checkpoint by whatever name a layer of theirs has.

    The names of an adapter carry the prefix of its model with a head, or the names of an older
    Transformers; so do the checkpoint's, which need not be the same.
    """

    def __init__(self, shape: Architecture, keys: Iterable[str]) -> None:
        self._shape, self._keys = shape, {shape.bare(key): key for key in keys}

    def find(self, name: str) -> str | None:
        """The checkpoint's key of a tensor, None where it has none."""
        return self._keys.get(self._shape.bare(name))

    @property
    def keys(self) -> list[str]:
        """The checkpoint's keys."""
        return list(self._keys.values())

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None


def key_of(layer: str, names: Names, base: Path) -> str:
    """The key of a layer's weight in the checkpoint.

    Raises:
        AdapterError: it has none; the message names the nearest.
    """
    key = names.find(f"{layer}.weight")
    if key is None:
        close = nearest(f"{layer}.weight", names.keys)
        hint = f", the nearest is '{close}'" if close else ""
        raise AdapterError(
            f"'{base}' has no weight of layer '{layer}'{hint}: name the base model that the "
            "adapters were trained on."
        )
    return key


def untied(
    changed: Iterable[str],
    stored: Mapping[str, Stored | Held],
    names: Names,
    shape: Architecture,
    base: Path,
) -> dict[str, Stored | Held] | None:
    """What the checkpoint leaves out because it is tied; None where nothing that changes is.

    `changed` are the bare names of the tensors that will not be the checkpoint's.

    Raises:
        AdapterError: a tie of more than two, which no configuration undoes.
    """
    bare = set(changed)
    touched = [pair for pair in shape.ties if any(shape.bare(end) in bare for end in pair)]
    if not touched:
        return None
    sources = [source for target, source in shape.ties if target.endswith(".weight")]
    if len(set(sources)) != len(sources):
        raise AdapterError(
            f"'{touched[0][0]}' is tied to '{touched[0][1]}' in '{base}' in a way that cannot be "
            "undone: merge adapters that leave both alone."
        )
    return {
        target: stored[source]
        for target, source in ((t, names.find(s)) for t, s in shape.ties)
        if source is not None and target not in names
    }


def missing_prefix(
    stored: Mapping[str, Stored | Held], planned: Mapping[str, Planned], shape: Architecture
) -> Callable[[str], str]:
    """How keys are called in the output: with the prefix where a head joins a bare backbone.

    A checkpoint of the backbone alone has no prefix, and is read as the backbone; with a head,
    it has to be one of the whole model.
    """
    added = [key for key in planned if key not in stored]
    start = f"{shape.prefix}."
    fits = all(key in shape.shapes for key in added) and any(
        shape.renamed(key) in shape.shapes for key in stored
    )
    bare = shape.prefix and added and not any(key.startswith(start) for key in planned)
    if not bare or fits:
        return str
    return partial(_with_prefix, start, frozenset(stored))


def _with_prefix(start: str, backbone: frozenset[str], key: str) -> str:
    return start + key if key in backbone else key
