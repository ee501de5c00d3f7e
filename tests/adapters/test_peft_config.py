"""`adapter_config.json` is PEFT's own, byte for byte, whether or not PEFT wrote it."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.metadata import version

import pytest
from peft import LoraConfig, TaskType

from orthomerge.adapters import kinds, peft_config, settings
from orthomerge.adapters.peft_config import DEFAULTS, SERIES, config_text

SETTINGS = [
    {"target_modules": ["query"], "r": 3, "lora_alpha": 3, "inference_mode": True},
    {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"layer.0.query": 2, "^layer.1.key": 1},
        "alpha_pattern": {"layer.0.query": 2, "^layer.1.key": 1},
        "target_modules": ["layer.1.key", "layer.0.query", "layer.0.value"],
        "fan_in_fan_out": True,
        "lora_bias": True,
        "modules_to_save": ["classifier", "pooler"],
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "Ünï/cødé",
        "revision": "v1",
        "inference_mode": True,
    },
]


def by_peft(asked, folder):
    """What PEFT writes, but for the order of a set."""
    LoraConfig(**asked).save_pretrained(folder)
    text = (folder / "adapter_config.json").read_text(encoding="utf-8")
    said = json.loads(text)
    assert json.dumps(said, indent=2, sort_keys=True) == text
    said["target_modules"] = sorted(said["target_modules"])
    return json.dumps(said, indent=2, sort_keys=True)


@pytest.mark.parametrize("asked", SETTINGS)
@pytest.mark.parametrize("series", [SERIES, "0.0."], ids=["known", "another PEFT"])
def test_the_text_is_the_one_that_peft_writes(asked, series, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_config, "SERIES", series)
    assert config_text(asked) == by_peft(asked, tmp_path)


@pytest.mark.skipif(not version("peft").startswith(SERIES), reason="another PEFT")
def test_no_variant_of_lora_passes_for_a_plain_setting():
    variants = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants & DEFAULTS.keys() <= kinds._HANDLED_VARIANTS


def test_the_task_types_are_those_of_peft():
    assert {kind.value for kind in TaskType} >= set(settings._TASK_TYPES)
