"""The keys of an adapter's file as PEFT means them, whatever the model was wrapped in when saved.

`torch.compile`, FSDP, DDP and Lightning put names of their own into keys, a state dict that was
saved by hand keeps the adapter's name, and a model wrapped by PEFT twice its prefix twice. PEFT
itself then reads none of the factors, one or all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from orthomerge.errors import AdapterError

PREFIX = "base_model.model."
EMPTY = (
    "DeepSpeed ZeRO-3 and FSDP leave such where the shards were not gathered; gather them and save "
    "the adapter again"
)
"""Where tensors without an entry come from."""
_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
_START = re.compile(r"^((module\.)*base_model\.model\.)+")
_FACTOR = re.compile(
    r"^(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<part>A|B|magnitude_vector)"
    r"(\.(?P<adapter>[^.]+?))??(\.(?P<kind>weight|bias))?$"
)
_WHOLE = re.compile(r"^(?P<module>.+)\.modules_to_save\.((?P<adapter>[^.]+)\.)?(?P<rest>.+)$")
_COPY = ".base_layer."


@dataclass(frozen=True)
class Key:
    """What is under a key of the file.

    `name` is the layer for a part of LoRA, else the tensor's own name in the base model; `part` is
    "A", "B", "bias" or "magnitude_vector", None for a whole tensor; `adapter` is the adapter's name
    where the key holds it; `copy` marks the base's own tensor below a layer that LoRA adapts.
    """

    name: str
    part: str | None = None
    embedding: bool = False
    adapter: str | None = None
    copy: bool = False

    @property
    def plain(self) -> str:
        """The key that PEFT's `save_pretrained` writes."""
        if self.copy:
            layer, _, leaf = self.name.rpartition(".")
            return f"{PREFIX}{layer}{_COPY}{leaf}"
        if self.part is None:
            return PREFIX + self.name
        stem = f"{PREFIX}{self.name}.lora_"
        if self.part == "magnitude_vector":
            return f"{stem}magnitude_vector"
        if self.embedding:
            return f"{stem}embedding_{self.part}"
        return f"{stem}B.bias" if self.part == "bias" else f"{stem}{self.part}.weight"


def unwrapped(key: str) -> str:
    """A key without what wrappers of the model added to it, and without PEFT's own prefix."""
    return _START.sub("", ".".join(part for part in key.split(".") if part not in _WRAPPERS))


def parsed(key: str) -> Key:
    """What a key of the file means; a key of no known kind is a whole tensor's."""
    name = unwrapped(key)
    factor = _FACTOR.match(name)
    if factor:
        part = "bias" if factor["kind"] == "bias" else factor["part"]
        return Key(factor["layer"], part, bool(factor["embedding"]), factor["adapter"])
    layer, copied, leaf = name.rpartition(_COPY)
    if copied:
        return Key(f"{layer}.{leaf}", copy=True)
    whole = _WHOLE.match(name)
    if whole:
        return Key(f"{whole['module']}.{whole['rest']}", adapter=whole["adapter"])
    return Key(name)


def parse_keys(keys: Collection[str], where: str) -> dict[str, Key]:
    """What every key of a file means, by key, without PEFT's untrained copies of whole modules.

    Raises:
        AdapterError: factors of several adapters, or two keys of one tensor.
    """
    plain = {unwrapped(key) for key in keys}
    found = {
        key: parsed(key)
        for key in keys
        if ".original_module." not in key
        # Beside the plain key, which is the one that PEFT reads.
        and not (_WHOLE.match(unwrapped(key)) and plain & _without_wrapper(key))
    }
    names = {key.adapter for key in found.values() if key.part and key.adapter}
    if len(names) > 1:
        listed = ", ".join(f"'{name}'" for name in sorted(names))
        raise AdapterError(
            f"'{where}' holds several adapters ({listed}): save one of them with save_pretrained("
            "..., selected_adapters=[...])."
        )
    _require_distinct(found, where)
    return found


def _without_wrapper(key: str) -> set[str]:
    """What a key of `modules_to_save` can mean: with the adapter's name taken off, and without."""
    module, _, rest = unwrapped(key).partition(".modules_to_save.")
    return {f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"}


def _require_distinct(found: Mapping[str, Key], where: str) -> None:
    seen: dict[str, str] = {}
    for key, meaning in found.items():
        other = seen.setdefault(meaning.plain, key)
        if other != key:
            raise AdapterError(
                f"'{where}' holds '{meaning.plain.removeprefix(PREFIX)}' twice, under '{other}' "
                f"and '{key}': load it once in PEFT and save it again with save_pretrained."
            )
