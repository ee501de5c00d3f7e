"""What the tensors of a PEFT LoRA folder are, and which kinds of LoRA are no plain update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, cast

from orthomerge.adapters.experts import expert_layers, parameters_of
from orthomerge.adapters.keys import EMPTY, parse_keys
from orthomerge.adapters.peft_config import DEFAULTS
from orthomerge.adapters.settings import LayerPatterns, check_names
from orthomerge.errors import AdapterError
from orthomerge.io.tensors import FLOATS, Stored

_FLAGS = {
    "use_qalora": "QALoRA, which pools its inputs",
    "alora_invocation_tokens": "aLoRA, which acts from a token on only",
    "use_bdlora": "block-diagonal",
    "arrow_config": "Arrow, which routes every token to adapters of its own",
    "kasa_config": "KaSA, which cuts the base's own weights (kasa_config)",
    "trainable_token_indices": "LoRA with single tokens trained (trainable_token_indices)",
    "layer_replication": "made for a base whose layers are repeated (layer_replication)",
    "megatron_config": "made for Megatron's parallel layers",
}
# Variants whose forward pass is `W + s B A`; the tensors they add are of training time alone.
_PLAIN_VARIANTS = {
    "velora_config": ".lora_velora_",
    "monteclora_config": ".lora_monteclora_",
}
_KNOWN = {*DEFAULTS, "peft_version"}
_HANDLED_VARIANTS = {"use_dora", *_PLAIN_VARIANTS, *_FLAGS}
# PEFT changes the base weights by these starts, so that B A alone is not the update.
_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
EMBEDDINGS = frozenset(
    ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")
)
"""What models call their input embeddings and the head over the vocabulary."""
# Types that move hidden states or turn weights: PEFT can write them into a model, if at all.
_MULTIPLY = ("IA3", "OFT", "BOFT", "HRA", "ROAD")


@dataclass(frozen=True)
class StoredLayer:
    """Where one layer's tensors lie in the file, its scaling and its shape.

    `shape` is (d_out, d_in); an embedding is read as the linear layer over one-hot tokens that it
    is, so its d_in is the vocabulary. A convolution is read as the linear layer over its patches:
    its d_in is channels times `kernel`, which has the sizes of the window. `parameter` is the
    tensor of `target_parameters` that the layer is of; where that is of several experts, B holds
    those of all, and `expert` is the number of this one and their count.
    """

    A: Stored
    B: Stored
    scaling: float
    shape: tuple[int, int]
    bias: Stored | None = None
    magnitude: Stored | None = None
    embedding: bool = False
    kernel: tuple[int, ...] = ()
    parameter: str | None = None
    expert: tuple[int, int] | None = None


def check_kind(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is not LoRA, or whose update is not `B A` (or DoRA's) on the plain base.

    Raises:
        AdapterError: one of those; the message says which, and the way out.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"'{where}' is of type {kind}: only LoRA adapters can be merged{_way_out(kind)}."
        )
    for flag, what in {**_FLAGS, **_unknown_variants(config)}.items():
        if config.get(flag):
            raise AdapterError(
                f"'{where}' is {what}: only adapters that add a plain update to the base's weights "
                "can be merged."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_STARTS):
        raise AdapterError(
            f"'{where}' was started with '{start}', which changes the base's weights: save it as a "
            "plain adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def _way_out(kind: Any) -> str:
    """What can be done with an adapter of another type than LoRA, by the PEFT that is here."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner: Any = cast(Any, PEFT_TYPE_TO_TUNER_MAPPING).get(kind)
    layer = getattr(tuner, "tuner_layer_cls", None)
    if hasattr(peft, "convert_to_lora") and layer is not None and _converts(tuner, layer):
        return (
            "; load it with PeftModel.from_pretrained and write it as LoRA with peft.save_as_lora "
            "(or peft.convert_to_lora), then name that folder"
        )
    if kind in _MULTIPLY:
        return "; it multiplies weights or activations, so there is no update to add up"
    if layer is None:
        return "; it changes no weight of the base"
    return ""


def _converts(tuner: Any, layer: Any) -> bool:
    """Whether a type of PEFT's has layers of its own whose update can be written as LoRA."""
    if layer.__module__.rpartition(".")[0] != tuner.__module__.rpartition(".")[0]:
        return False
    beside = vars(import_module(layer.__module__)).values()
    own = [c for c in beside if isinstance(c, type) and c.__module__ == layer.__module__]
    return any("supports_lora_conversion" in vars(kind) for kind in own)


def _unknown_variants(config: Mapping[str, Any]) -> dict[str, str]:
    """Kinds of LoRA that this PEFT knows and nobody looked at: no plain update until one did."""
    if not any(value and key not in _KNOWN for key, value in config.items()):
        return {}
    from peft import LoraConfig

    return {
        field.name: f"a variant of LoRA that is not known here ({field.name})"
        for field in fields(LoraConfig)
        if field.metadata.get("is_lora_variant") and field.name not in _HANDLED_VARIANTS
    }


def sort_keys(
    entries: Mapping[str, Stored], config: Mapping[str, Any], where: str
) -> tuple[dict[str, StoredLayer], dict[str, Stored], dict[str, Stored]]:
    """The adapted layers by their name in the base model, whole tensors, and the base's copies.

    Whole tensors are those that were trained. Copies are the base's own embeddings, which PEFT
    saves where they are adapted or were resized.

    Raises:
        AdapterError: halves that are missing, sizes that do not fit, or tensors of no known kind.
    """
    training = tuple(v for k, v in _PLAIN_VARIANTS.items() if config.get(k))
    kept = [key for key in entries if not any(part in key for part in training)]
    parts: dict[str, dict[str, str]] = {}
    modules: dict[str, Stored] = {}
    copies: dict[str, Stored] = {}
    for key, meaning in parse_keys(kept, where).items():
        name = meaning.name
        if meaning.part is not None:
            found = parts.setdefault(name, {})
            found[f"embedding_{meaning.part}" if meaning.embedding else meaning.part] = key
        elif ".lora_" in name or name.endswith("trainable_tokens_delta"):
            raise AdapterError(
                f"'{where}' holds '{key}', which is no factor of a linear, convolutional or "
                "embedding layer: adapters of that kind cannot be merged."
            )
        elif meaning.copy or is_copy(name, config):
            copies[name] = entries[key]
        else:
            modules[name] = entries[key]
    if not parts:
        raise AdapterError(
            f"'{where}' holds no LoRA factor: it was saved after merge_and_unload; save it before."
        )
    _refuse_base_biases(modules, config, where)
    _refuse_many_copies(copies, where)
    _check_modules({**modules, **copies}, where)
    ranks = LayerPatterns(config.get("rank_pattern"), config["r"], where)
    alphas = LayerPatterns(config.get("alpha_pattern"), config["lora_alpha"], where)
    check_names(parts, (ranks, alphas), where)
    rows = {n: entries[f["A"]].shape[:1] for n, f in parts.items() if "A" in f}
    plain = [name for name, found in rows.items() if found == (ranks.of(name),)]
    tensors = parameters_of(parts, config.get("target_parameters") or (), plain, where)
    layers: dict[str, StoredLayer] = {}
    for name, found in parts.items():
        tensor = tensors.get(name)
        rank, alpha = (pattern.of(tensor or name) for pattern in (ranks, alphas))
        if tensor is None:
            layers[name] = stored_layer(name, found, entries, config, where, rank, alpha)
        else:
            layers |= _experts(tensor, found, entries, config, where, rank, alpha)
    return layers, modules, copies


def is_copy(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a whole tensor is of embeddings that were not trained, by their name."""
    module = name.rpartition(".")[0]
    saved = tuple(config.get("modules_to_save") or ())
    trained = bool(saved) and any(
        ".".join(module.split(".")[:i]).endswith(saved) for i in range(1, module.count(".") + 2)
    )
    return not trained and module.rpartition(".")[2] in EMBEDDINGS


def _refuse_many_copies(copies: Mapping[str, Stored], where: str) -> None:
    """PEFT saves embeddings alone; more of the base's weights are a dump of the whole model."""
    for name in copies:
        module = name.rpartition(".")[0]
        if len(copies) > 3 and module.rpartition(".")[2] not in EMBEDDINGS:
            raise AdapterError(
                f"'{where}' holds the base's own weights ('{name}'): it is the state of a whole "
                "model; load it once in PEFT and save it with save_pretrained."
            )


def stored_layer(
    layer: str,
    found: Mapping[str, str],
    entries: Mapping[str, Stored],
    config: Mapping[str, Any],
    where: str,
    rank: int,
    alpha: float,
) -> StoredLayer:
    """One layer from the keys of its parts, which must fit each other and the rank.

    Raises:
        AdapterError: they do not, or one is missing.
    """
    embedding = any(part.startswith("embedding_") for part in found)
    A, B = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for part in (A, B):
        if part not in found:
            raise AdapterError(
                f"layer '{layer}' of '{where}' has no lora_{part}: it was cut; save it again."
            )
    factor_A, factor_B = entries[found[A]], entries[found[B]]
    _check_factors(layer, {key: entries[key] for key in found.values()}, factor_A, factor_B, where)
    a, b = factor_A.shape, factor_B.shape
    if a[2:] and a[0] != b[1]:
        raise AdapterError(
            f"layer '{layer}' of '{where}' is a convolution in groups (A {list(a)}, B {list(b)}), "
            "whose update is no product of two matrices: merge adapters without it."
        )
    if not a[0] == b[1] == rank:
        raise AdapterError(
            f"layer '{layer}' of '{where}' has A {list(a)} and B {list(b)} where its config says "
            f"rank {rank}: A must be [rank, d_in] and B [d_out, rank]; save it again."
        )
    bias, magnitude = (
        entries[found[part]] if part in found else None for part in ("bias", "magnitude_vector")
    )
    for part in (bias, magnitude):
        if part is not None and math.prod(part.shape) != b[0]:
            raise AdapterError(
                f"layer '{layer}' of '{where}' has {b[0]} outputs and a bias or magnitude of "
                f"{list(part.shape)}: save it again."
            )
    if (magnitude is not None) != bool(config.get("use_dora")):
        raise AdapterError(
            f"layer '{layer}' of '{where}' and its config do not agree on use_dora: save it again."
        )
    scaling, shape = _scaling(config, rank, alpha), (b[0], math.prod(a[1:]))
    return StoredLayer(factor_A, factor_B, scaling, shape, bias, magnitude, embedding, a[2:])


def _scaling(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _experts(
    tensor: str,
    found: Mapping[str, str],
    entries: Mapping[str, Stored],
    config: Mapping[str, Any],
    where: str,
    rank: int,
    alpha: float,
) -> dict[str, StoredLayer]:
    """The layers of a tensor that `target_parameters` adapts: its experts, or its one matrix."""
    rows = entries[found["A"]].shape[:1] if "A" in found else ()
    count = rows[0] // rank if rows and rows[0] and rows[0] % rank == 0 else 1
    whole = stored_layer(tensor, found, entries, config, where, count * rank, alpha)
    if (count == 1 and not tensor.endswith(".weight")) or set(found) != {"A", "B"}:
        raise AdapterError(
            f"'{where}' adapts '{tensor}' by target_parameters, which is neither a layer's weight "
            "nor a tensor of experts: adapters of such cannot be merged."
        )
    scaling = _scaling(config, rank, alpha)
    return {
        layer: replace(
            whole,
            A=whole.A.rows(i * rank, (i + 1) * rank),
            scaling=scaling,
            parameter=tensor,
            expert=(i, count) if count > 1 else None,
        )
        for i, layer in enumerate(expert_layers(tensor, count))
    }


def _check_factors(
    layer: str, entries: Mapping[str, Stored], factor_A: Stored, factor_B: Stored, where: str
) -> None:
    """Refuse factors without entries, of no layer of ours, and a part that is not in floats."""
    a, b = factor_A.shape, factor_B.shape
    if not all((*a, *b)):
        raise AdapterError(
            f"layer '{layer}' of '{where}' has factors {list(a)} and {list(b)}, without an entry: "
            f"{EMPTY}."
        )
    if not len(a) == len(b) > 1 or set(b[2:]) - {1}:
        raise AdapterError(
            f"layer '{layer}' of '{where}' has factors {list(a)} and {list(b)}: only linear, "
            "convolutional and embedding layers can be merged."
        )
    for key, entry in entries.items():
        if entry.dtype not in FLOATS:
            raise AdapterError(
                f"'{key}' of '{where}' is of type {entry.dtype}: only floating-point "
                "factors can be merged; save it in 16 or 32 bits."
            )


def _check_modules(modules: Mapping[str, Stored], where: str) -> None:
    """Refuse whole tensors without an entry."""
    for name, stored in modules.items():
        if not math.prod(stored.shape):
            raise AdapterError(
                f"'{name}' of '{where}' is {list(stored.shape)}, without an entry: {EMPTY}."
            )


def _refuse_base_biases(modules: Iterable[str], config: Mapping[str, Any], where: str) -> None:
    """`bias="all"` trains the base's biases: the adapter holds new values, not an update."""
    if config.get("bias") in (None, "none"):
        return
    saved = set(config.get("modules_to_save") or ())
    for name in modules:
        if name.endswith(".bias") and not saved & set(name.split(".")):
            raise AdapterError(
                f"'{where}' trained the base's own biases ('{name}', bias='{config['bias']}'): "
                "they cannot be merged; train it with bias='none' or lora_bias=True."
            )
