"""`adapter_config.json` as PEFT writes it, without PEFT, whose import takes longer than a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, cast

SERIES = "0.21."
"""The versions of PEFT that `DEFAULTS` are of; under any other one PEFT itself is asked."""

DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "auto_mapping", "base_model_name_or_path",
         "corda_config", "eva_config", "exclude_modules", "kasa_config", "layer_replication",
         "layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_config",
         "modules_to_save", "monteclora_config", "revision", "target_modules",
         "target_parameters", "task_type", "trainable_token_indices", "use_bdlora",
         "velora_config")
    ),
    **dict.fromkeys(
        ("ensure_weight_tying", "fan_in_fan_out", "inference_mode", "lora_bias", "use_dora",
         "use_qalora", "use_rslora"),
        False,
    ),
    "alpha_pattern": {},
    "bias": "none",
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
}  # fmt: skip
"""What PEFT's `LoraConfig` is where nothing is said; the version comes besides."""


def config_text(settings: Mapping[str, Any]) -> str:
    """What `LoraConfig(**settings).save_pretrained` writes, target modules in alphabetical order.

    PEFT holds them as a set, whose order differs from process to process.
    """
    installed = version("peft")
    made: dict[str, Any]
    if installed.startswith(SERIES) and "dev" not in installed:
        made = {**DEFAULTS, "peft_version": installed, **settings}
    else:
        from peft import LoraConfig

        made = cast(dict[str, Any], LoraConfig(**settings).to_dict())
    made["target_modules"] = sorted(settings["target_modules"])
    return json.dumps(made, indent=2, sort_keys=True)
