"""Tiny mixtures of experts of real architectures, as Transformers 5 keeps them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS, WIDE, INSIDE = 3, 16, 24
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": WIDE, "intermediate_size": INSIDE, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2, "pad_token_id": 0,
    "experts_implementation": "eager",
}  # fmt: skip
_QWEN: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": INSIDE}


def _made(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config).eval()


def mixtral(**changes: Any) -> PreTrainedModel:
    sizes = _SIZES | {"num_local_experts": EXPERTS} | changes
    return _made(MixtralForCausalLM, MixtralConfig(**sizes))


def qwen2_moe(**changes: Any) -> PreTrainedModel:
    sizes = _SIZES | _QWEN | {"shared_expert_intermediate_size": 8} | changes
    return _made(Qwen2MoeForCausalLM, Qwen2MoeConfig(**sizes))


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    return _made(
        Qwen3MoeForCausalLM, Qwen3MoeConfig(**(_SIZES | _QWEN | {"head_dim": 8} | changes))
    )


def gpt_oss(**changes: Any) -> PreTrainedModel:
    sizes = _SIZES | {"num_local_experts": EXPERTS, "head_dim": 8} | changes
    return _made(GptOssForCausalLM, GptOssConfig(**sizes))


MIXTURES = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
EVERY = pytest.mark.parametrize("make", MIXTURES.values(), ids=list(MIXTURES))
PRESENT_LAYOUT = pytest.mark.skipif(
    not find_spec("peft.utils.transformers_weight_conversion"),
    reason="older PEFTs take every tensor of experts for [experts, d_in, d_out]",
)
