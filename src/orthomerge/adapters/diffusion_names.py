"""What kohya, the first authors and diffusers call one layer of a diffusion model.

kohya's names have underscores for dots (`lora_unet_down_blocks_0_...`), which loses where a name
ends, so they are read by the names of modules that Stable Diffusion 1 and 2, SDXL and Flux have.
SDXL and Flux have their first authors' names there (`input_blocks_4_1`, `double_blocks_0`), and
Flux keeps projections in one layer that diffusers has apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from orthomerge.errors import AdapterError
from orthomerge.io.names import CONFIG, DIFFUSION
from orthomerge.io.tensors import read_header

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""diffusers' names of the models of a pipeline, with which the names of layers begin."""
KOHYA = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
"""How kohya's names begin."""
AUTHORS = "diffusion_model."
"""How the dotted names of the first authors begin, as ComfyUI has them."""

FACTOR = re.compile(
    r"^(?P<layer>.+?)((?P<old>_lora|\.lora|\.lora_linear_layer)\.(down|up)"
    r"|\.(lora_down|lora_up|lora_A(\.default)?|lora_B(\.default)?))\.weight$"
)
"""A key of one of LoRA's two factors, in any of the forms."""
OTHER_KINDS = {
    "dora_scale": "DoRA, whose update needs the model's weights",
    "lora_magnitude_vector": "DoRA, whose update needs the model's weights",
    "lora_mid": "LoCon in three factors (Tucker), whose update is no product of two matrices",
    "hada_": "LoHa, whose update is no product of two matrices",
    "lokr_": "LoKr, whose update is no product of two matrices",
    "oft_": "OFT, which multiplies weights",
    ".diff": "whole differences of weights (diff)",
    "bundle_emb": "an adapter with embeddings of new words (bundle_emb)",
}
"""What is in the keys of other kinds, and what those are."""

_UNET = (
    "down_blocks up_blocks mid_block resnets attentions downsamplers upsamplers conv conv1 conv2 "
    "conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 "
    "proj_in proj_out transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj"
)
_FLUX = (
    "single_transformer_blocks attn add_q_proj add_k_proj add_v_proj to_add_out ff_context norm "
    "norm1 norm1_context norm_out linear proj_mlp x_embedder context_embedder time_text_embed "
    "timestep_embedder guidance_embedder text_embedder"
)
_CLIP = (
    "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 embeddings "
    "token_embedding position_embedding text_projection"
)
_WORDS = frozenset(" ".join((_UNET, _FLUX, _CLIP)).split())
_LONGEST = max(word.count("_") for word in _WORDS) + 1
_FIRST = {
    "unet": {
        "down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding",
        "add_embedding",
    },
    "transformer": {
        "transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder",
        "time_text_embed", "norm_out", "proj_out",
    },
    "text_encoder": {"text_model", "text_projection"},
}  # fmt: skip
"""The modules of a component, by which a name without one is known."""

# Flux: each layer of the authors', with `#` for a number, and what of it diffusers has, in the
# order of its rows.
_FLUX_LAYERS = {
    **{
        f"double_blocks_#_{side}_{own}": tuple(f"transformer_blocks.#.{part}" for part in parts)
        for side, attn, added, suffix in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", ""),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "_context"),
        )
        for own, parts in (
            ("attn_qkv", tuple(f"attn.{name}" for name in attn)),
            ("attn_proj", (f"attn.{added}",)),
            ("mlp_0", (f"ff{suffix}.net.0.proj",)),
            ("mlp_2", (f"ff{suffix}.net.2",)),
            ("mod_lin", (f"norm1{suffix}.linear",)),
        )
    },
    "single_blocks_#_linear1": tuple(
        f"single_transformer_blocks.#.{part}"
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ),
    "single_blocks_#_linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks_#_modulation_lin": ("single_transformer_blocks.#.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
    **{
        f"{own}_in_{place}_layer": (f"time_text_embed.{theirs}_embedder.linear_{number}",)
        for own, theirs in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))
        for place, number in (("in", 1), ("out", 2))
    },
}
SWAPPED = "norm_out.linear"
"""The layer of Flux whose two halves of rows diffusers has the other way round."""


def _sdxl_layers() -> Iterator[tuple[str, str]]:
    """The authors' names of the layers and blocks of SDXL's UNet, beside diffusers'."""
    yield from (
        ("input_blocks_0_0", "conv_in"), ("out_2", "conv_out"),
        ("time_embed_0", "time_embedding.linear_1"), ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"), ("label_emb_0_2", "add_embedding.linear_2"),
    )  # fmt: skip
    resnets = [("middle_block_0", "mid_block.resnets.0"), ("middle_block_2", "mid_block.resnets.1")]
    yield "middle_block_1", "mid_block.attentions.0"
    for block in range(3):
        for layer in range(2):
            own, theirs = f"input_blocks_{1 + 3 * block + layer}", f"down_blocks.{block}"
            resnets.append((f"{own}_0", f"{theirs}.resnets.{layer}"))
            if block > 0:
                yield f"{own}_1", f"{theirs}.attentions.{layer}"
        for layer in range(3):
            own, theirs = f"output_blocks_{3 * block + layer}", f"up_blocks.{block}"
            resnets.append((f"{own}_0", f"{theirs}.resnets.{layer}"))
            if block < 2:
                yield f"{own}_1", f"{theirs}.attentions.{layer}"
        if block < 2:
            yield f"input_blocks_{3 + 3 * block}_0_op", f"down_blocks.{block}.downsamplers.0.conv"
            yield f"output_blocks_{2 + 3 * block}_2_conv", f"up_blocks.{block}.upsamplers.0.conv"
    for own, theirs in resnets:
        yield f"{own}_in_layers_2", f"{theirs}.conv1"
        yield f"{own}_out_layers_3", f"{theirs}.conv2"
        yield f"{own}_emb_layers_1", f"{theirs}.time_emb_proj"
        yield f"{own}_skip_connection", f"{theirs}.conv_shortcut"


_SDXL_LAYERS = dict(_sdxl_layers())


class Place(NamedTuple):
    """Where a layer of diffusers is among kohya's: the name, which part of it, and of how many."""

    name: str
    part: int = 0
    parts: tuple[str, ...] = ()


def dotted(name: str) -> tuple[str, ...] | None:
    """diffusers' names of a layer, in the order of its rows; None where there is none."""
    name = _without_authors(name)
    start = next((s for s in KOHYA if name.startswith(s)), None)
    if start is None:
        found = with_component(name)
        return (found,) if found.partition(".")[0] in COMPONENTS else None
    flat = name.removeprefix(start)
    if start == KOHYA[0]:
        pattern, number = _numbered(flat)
        if pattern in _FLUX_LAYERS:
            return tuple(
                f"transformer.{part.replace('#', number)}" for part in _FLUX_LAYERS[pattern]
            )
        sdxl = _of_blocks(flat, _SDXL_LAYERS, "_")
        if sdxl is not None:
            rest = _unflattened(sdxl[1])
            return None if rest is None else (f"unet.{sdxl[0]}{rest and f'.{rest}'}",)
    if start == "lora_te3_":
        return None
    found = _unflattened(flat)
    if found is None:
        return None
    if start in KOHYA[:2]:
        found = with_component(found)
        return (found,) if found.partition(".")[0] in COMPONENTS else None
    return (f"text_encoder{'_2' if start == 'lora_te2_' else ''}.{found}",)


def with_component(name: str) -> str:
    """A dotted name with the component that it is of in front; as it is where that is not known."""
    first = name.partition(".")[0]
    of = next((c for c, firsts in _FIRST.items() if first in firsts), None)
    return name if first in COMPONENTS or of is None else f"{of}.{name}"


def kohya_place(name: str, family: str) -> Place | None:
    """kohya's name of a layer of diffusers in a model of that family; None where there is none."""
    component, _, rest = name.partition(".")
    if component == "text_encoder" or (component == "text_encoder_2" and family == SDXL):
        number = {"text_encoder": "" if family == SD else "1", "text_encoder_2": "2"}[component]
        return Place(f"lora_te{number}_{_flat(rest)}")
    if component == "transformer":
        pattern, number = _numbered(rest)
        for own, parts in _FLUX_LAYERS.items():
            if pattern in parts:
                named = tuple(f"transformer.{part.replace('#', number)}" for part in parts)
                return Place(f"{KOHYA[0]}{own.replace('#', number)}", parts.index(pattern), named)
        return None
    if component != "unet":
        return None
    if family == SD:
        return Place(f"{KOHYA[0]}{_flat(rest)}")
    sdxl = _of_blocks(rest, {theirs: own for own, theirs in _SDXL_LAYERS.items()}, ".")
    if sdxl is None:
        return None
    return Place(f"{KOHYA[0]}{sdxl[0]}{sdxl[1] and f'_{_flat(sdxl[1])}'}")


SD, SDXL, FLUX = "Stable Diffusion 1 or 2", "SDXL", "Flux"
_SAID = (("sdxl", SDXL), ("xl-v1", SDXL), ("flux", FLUX), ("sd_v", SD), ("stable-diffusion-v", SD))


def family_of(
    layers: Mapping[str, tuple[int, int]], header: Mapping[str, str], where: str
) -> str | None:
    """Which model a file is of: by its layers, else by its header; None where neither says.

    Raises:
        AdapterError: its header says another than its layers.
    """
    said = " ".join(header.get(key, "") for key in AGREED).lower()
    named = next((family for word, family in _SAID if word in said), None)
    seen = set(_seen(layers))
    if len(seen) > 1 or (named and seen and named not in seen):
        raise AdapterError(
            f"'{where}' has layers of {' and of '.join(sorted(seen))}"
            f"{f' and says that it is of {named}' if named else ''}: it was put together of two "
            "files; name each by itself."
        )
    return named or next(iter(seen), None)


AGREED = ("ss_base_model_version", "ss_v2", "modelspec.architecture")
"""What a header says of the base model; what all inputs agree on is written again."""


def _seen(layers: Mapping[str, tuple[int, int]]) -> Iterable[str]:
    """Families that a layer's name or size is of alone."""
    for called, (_, d_in) in layers.items():
        name = _without_authors(called)
        if re.match(r"lora_unet_(double|single)_blocks|(lora_)?transformer[._]", name):
            yield FLUX
        elif re.match(
            r"lora_unet_(input_blocks|middle_block|output_blocks)"
            r"|(lora_te2_|text_encoder_2\.)text_model",
            name,
        ):
            yield SDXL
        elif re.match(r"lora_te_|unet\.(down_blocks\.0|up_blocks\.3)\.attentions", name):
            yield SD
        elif re.search(r"unet\..*\.transformer_blocks\.[1-9]|unet\.add_embedding", name):
            yield SDXL
        elif re.match(r"unet\..*\.attn2\.to_[kv]$", name) and d_in in (768, 1024, 2048):
            yield SDXL if d_in == 2048 else SD


def _numbered(name: str) -> tuple[str, str]:
    """The name with `#` for its first number, and the number."""
    found = re.match(r"^(.*?blocks[_.])(\d+)([_.].*)$", name)
    return (f"{found[1]}#{found[3]}", found[2]) if found else (name, "")


def _of_blocks(name: str, table: Mapping[str, str], sign: str) -> tuple[str, str] | None:
    """The other name of the block that a name begins with, and the rest of the name."""
    own = max((b for b in table if f"{name}{sign}".startswith(b + sign)), key=len, default=None)
    return None if own is None else (table[own], name[len(own) + 1 :])


def _without_authors(name: str) -> str:
    """A dotted name of the first authors' as kohya has it."""
    own = name.removeprefix(AUTHORS)
    return name if own == name else KOHYA[0] + _flat(own)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _unflattened(flat: str) -> str | None:
    """The dots of a name back, by the longest names of modules; None where one is not known."""
    found: list[str] = []
    parts = flat.split("_") if flat else []
    while parts:
        for length in range(min(_LONGEST, len(parts)), 0, -1):
            word = "_".join(parts[:length])
            if word in _WORDS or (length == 1 and word.isdigit()):
                found.append(word)
                del parts[:length]
                break
        else:
            return None
    return ".".join(found)


def find_diffusion_file(place: Path) -> Path | None:
    """The file of a diffusion model's adapter at a path: itself, or the one in a folder."""
    if place.is_file():
        return place if place.suffix == ".safetensors" and is_diffusion_file(place) else None
    if not place.is_dir() or (place / CONFIG).is_file():
        return None
    if (place / DIFFUSION).is_file():
        return place / DIFFUSION
    found = [file for file in sorted(place.glob("*.safetensors")) if is_diffusion_file(file)]
    return found[0] if len(found) == 1 else None


def is_diffusion_file(file: Path) -> bool:
    """Whether a file's names of tensors are those of such an adapter."""
    try:
        keys = read_header(file)
    except AdapterError:
        return False
    return any(
        key.startswith((*KOHYA, AUTHORS)) or with_component(key).partition(".")[0] in COMPONENTS
        for key in keys
        if FACTOR.match(key) or any(word in key for word in OTHER_KINDS)
    )
