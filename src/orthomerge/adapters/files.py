"""PEFT adapter folders: read into factors, written from factors. Only safetensors is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthomerge.errors import AdapterError
from orthomerge.factors import LoraFactors, from_dense
from orthomerge.files import atomic_path, file_sha256, slug, write_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEADS, HEAD = "heads", ".safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(rf"^{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<which>[AB])\.weight$")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory.

    `layers` maps a layer's name in the base model to its factors; `modules` holds the weights of
    `modules_to_save` (the head) by name; `config` is `adapter_config.json` as it stands.
    """

    name: str
    layers: dict[str, LoraFactors]
    modules: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    sha256: str | None = None

    @property
    def base_model(self) -> str | None:
        """The base model the adapter says it belongs to."""
        return self.config.get("base_model_name_or_path")


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA folder. Scaling follows rank and alpha patterns and rsLoRA.

    Raises:
        AdapterError: no adapter there, pickled weights, a kind that is not LoRA (or DoRA), or
            factors that do not pair up.
    """
    path = Path(path)
    config_file, weights = path / CONFIG, path / WEIGHTS
    if not config_file.is_file():
        raise AdapterError(f"no adapter at '{path}': it has no {CONFIG}.")
    if not weights.is_file():
        if (path / "adapter_model.bin").is_file():
            raise AdapterError(
                f"'{path}' holds pickled weights (adapter_model.bin), which are never read: load "
                "it once in PEFT and save it again with save_pretrained to get safetensors."
            )
        raise AdapterError(f"no adapter at '{path}': it has no {WEIGHTS}.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        tensors = load_file(weights)
    except (ValueError, SafetensorError, OSError) as problem:
        raise AdapterError(f"'{path}' cannot be read as an adapter: {problem}.") from problem
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"'{path}' is of type {kind}: only LoRA adapters can be merged.")
    if config.get("use_dora"):
        raise AdapterError(
            f"'{path}' is a DoRA adapter, whose update is not B A alone: merge it into its base "
            "with PEFT's merge_and_unload, or train it without use_dora."
        )
    halves: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.match(key)
        if match:
            halves.setdefault(match["layer"], {})[match["which"]] = tensor
        elif ".lora_" in key:
            raise AdapterError(
                f"'{path}' holds '{key}', which is not a factor of a linear layer: adapters with "
                "embeddings or biases of LoRA cannot be merged yet."
            )
        else:
            modules[key.removeprefix(PREFIX)] = tensor
    layers: dict[str, LoraFactors] = {}
    for layer, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(
                f"layer '{layer}' of '{path}' has only lora_{next(iter(pair))}: it was cut."
            )
        layers[layer] = LoraFactors(pair["A"], pair["B"], _scaling(config, layer))
    if not layers:
        raise AdapterError(
            f"'{path}' holds no LoRA factor: it was saved after merge_and_unload; save it before."
        )
    return Adapter(path.name, layers, modules, config, path, file_sha256(weights))


def _scaling(config: Mapping[str, Any], layer: str) -> float:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), layer), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def require_same_base(adapters: list[Adapter]) -> None:
    """Refuse adapters of different base models.

    Raises:
        AdapterError: two adapters name different bases, or share no layer.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if first.base_model and other.base_model and first.base_model != other.base_model:
            raise AdapterError(
                f"'{first.path or first.name}' belongs to '{first.base_model}' and "
                f"'{other.path or other.name}' to '{other.base_model}': only adapters of one base "
                "model can be merged."
            )
        if not set(first.layers) & set(other.layers):
            raise AdapterError(
                f"'{first.path or first.name}' and '{other.path or other.name}' share no layer: "
                "they were trained on different models or targets."
            )


def as_factors(update: LoraFactors | Tensor, rank: int | None = None) -> LoraFactors:
    """A merged layer as factors: as it is, or the (best rank-`rank`) factors of a dense update."""
    return update if isinstance(update, LoraFactors) else from_dense(update, rank)


def write_adapter(
    path: str | Path,
    layers: Mapping[str, LoraFactors],
    *,
    base_model: str | None,
    modules: Mapping[str, Tensor] | None = None,
    modules_to_save: list[str] | None = None,
    task_type: str | None = None,
    extra: Mapping[str, Any] | None = None,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    readme: str | None = None,
) -> Path:
    """Write factors as an ordinary PEFT folder that loads with `PeftModel.from_pretrained`.

    The scaling goes into B (alpha = r). Ranks may differ by layer (`rank_pattern`). `extra` maps
    further JSON files of the folder to their content; `heads` are written to `heads/<name>`.
    """
    path = Path(path)
    ranks = {name: f.rank for name, f in layers.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {name: r for name, r in ranks.items() if r != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=odd,
        alpha_pattern=dict(odd),
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in layers})
        if _ends_suffice(layers)
        else sorted(layers),
        modules_to_save=modules_to_save,
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for name, item in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = item.A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (item.B * item.scaling).contiguous()
    for name, tensor in (modules or {}).items():
        tensors[PREFIX + name] = tensor.contiguous()
    with atomic_path(path) as folder:
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        for name, content in (extra or {}).items():
            write_json(folder / name, content)
        for name, head in (heads or {}).items():
            (folder / HEADS).mkdir(exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in head.items()}, folder / HEADS / f"{slug(name)}{HEAD}"
            )
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")
    return path


def _ends_suffice(layers: Mapping[str, Any]) -> bool:
    """Whether naming the last parts of the layer names adapts these layers in every block."""
    ends = {name.rsplit(".", 1)[-1] for name in layers}
    blocks = {re.sub(rf"\.({'|'.join(map(re.escape, ends))})$", "", n) for n in layers}
    return len(layers) == len(ends) * len(blocks)


def read_head(path: str | Path) -> dict[str, Tensor]:
    """A task's head, from a `heads/<task>.safetensors` or from the task's own adapter folder.

    Raises:
        AdapterError: neither of the two, or a file that is not safetensors.
    """
    path = Path(path)
    if path.is_dir():
        return read_adapter(path).modules
    if path.suffix != HEAD or not path.is_file():
        raise AdapterError(f"no head at '{path}': name an adapter folder or a {HEAD} file.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise AdapterError(f"'{path}' cannot be read as a head: {problem}.") from problem
