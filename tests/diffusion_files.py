"""Files of adapters of diffusion models with the names of the real models, small; and their ΔW."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each adapted weight, by kohya's name of the layer."""

_BLOCK = {
    "attn1_to_q": (8, 8), "attn1_to_out_0": (8, 8), "attn2_to_k": (8, 12), "ff_net_0_proj": (32, 8),
    "ff_net_2": (8, 16),
}  # fmt: skip
_CLIP = {"self_attn_q_proj": (6, 6), "self_attn_out_proj": (6, 6), "mlp_fc1": (12, 6)}


def _transformer(block: str, count: int = 1, kernel: tuple[int, ...] = ()) -> Shapes:
    ends = {f"{block}_proj_in": (8, 8, *kernel), f"{block}_proj_out": (8, 8, *kernel)}
    inner = {
        f"{block}_transformer_blocks_{i}_{k}": v for i in range(count) for k, v in _BLOCK.items()
    }
    return ends | inner


SD = {
    **_transformer("lora_unet_down_blocks_0_attentions_1", kernel=(1, 1)),
    **_transformer("lora_unet_up_blocks_3_attentions_2", kernel=(1, 1)),
    **{f"lora_te_text_model_encoder_layers_1_{k}": v for k, v in _CLIP.items()},
    "lora_unet_down_blocks_0_resnets_0_conv1": (8, 8, 3, 3),
    "lora_unet_down_blocks_0_resnets_0_time_emb_proj": (8, 16),
    "lora_unet_up_blocks_1_resnets_0_conv_shortcut": (8, 16, 1, 1),
    "lora_unet_down_blocks_0_downsamplers_0_conv": (8, 8, 3, 3),
    "lora_unet_time_embedding_linear_1": (16, 8),
    "lora_unet_conv_in": (8, 4, 3, 3),
}
SDXL = {
    **_transformer("lora_unet_input_blocks_4_1", 2),
    **_transformer("lora_unet_middle_block_1", 2),
    **_transformer("lora_unet_output_blocks_5_1", 2),
    **{f"lora_te1_text_model_encoder_layers_0_{k}": v for k, v in _CLIP.items()},
    **{f"lora_te2_text_model_encoder_layers_0_{k}": v for k, v in _CLIP.items()},
    "lora_unet_input_blocks_2_0_in_layers_2": (8, 8, 3, 3),
    "lora_unet_input_blocks_3_0_op": (8, 8, 3, 3),
    "lora_unet_middle_block_2_emb_layers_1": (8, 16),
    "lora_unet_output_blocks_3_0_skip_connection": (8, 16, 1, 1),
    "lora_unet_output_blocks_2_2_conv": (8, 8, 3, 3),
    "lora_unet_output_blocks_8_0_out_layers_3": (8, 8, 3, 3),
}
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (24, 8),
    "lora_unet_double_blocks_0_img_attn_proj": (8, 8),
    "lora_unet_double_blocks_0_txt_attn_qkv": (24, 8),
    "lora_unet_double_blocks_0_txt_mlp_0": (32, 8),
    "lora_unet_double_blocks_0_img_mlp_2": (8, 32),
    "lora_unet_double_blocks_0_img_mod_lin": (48, 8),
    "lora_unet_single_blocks_11_linear1": (56, 8),
    "lora_unet_single_blocks_11_linear2": (8, 40),
    "lora_unet_single_blocks_11_modulation_lin": (24, 8),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (12, 6),
}
MODELS = {"SD 1.5": SD, "SDXL": SDXL, "Flux": FLUX}


def kohya(
    file: Path,
    shapes: Shapes,
    seed: int,
    *,
    rank: int = 2,
    alpha: float | None = 1.0,
    dtype: torch.dtype = torch.float32,
    header: Mapping[str, str] | None = None,
) -> Path:
    """A file as kohya's sd-scripts writes it, its values drawn under `seed`."""
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (d_out, d_in, *window) in shapes.items():
        ones = [1] * len(window)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, d_in, *window, generator=g) / 3
        tensors[f"{name}.lora_up.weight"] = torch.randn(d_out, rank, *ones, generator=g) / 3
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file({k: v.to(dtype) for k, v in tensors.items()}, file, dict(header or {}))
    return file


def updates(file: Path) -> dict[str, torch.Tensor]:
    """Every layer's `alpha/r · up @ down`, flat and in float64, from the file's own keys alone."""
    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key).double() for key in stored.keys()}  # noqa: SIM118
        settings = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
    found: dict[str, torch.Tensor] = {}
    for down, up in (
        ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up"),
        ("lora_linear_layer.down", "lora_linear_layer.up"), ("_lora.down", "_lora.up"),
    ):  # fmt: skip
        end = f"{down if down.startswith('_') else '.' + down}.weight"
        for key in (k for k in tensors if k.endswith(end)):
            name = key.removesuffix(end)
            A, B = tensors[key], tensors[key.replace(down, up)]
            part = name.partition(".")[0]
            rank = len(A)
            alpha = settings.get(f"{part}.lora_alpha", rank)
            if settings.get(f"{part}.use_rslora"):
                alpha *= math.sqrt(rank)
            scale = float(tensors.get(f"{name}.alpha", torch.tensor(float(alpha)))) / rank
            found[name] = scale * B.flatten(1) @ A.flatten(1)
    return found
