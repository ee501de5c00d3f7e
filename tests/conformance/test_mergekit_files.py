"""One mergekit configuration, given to mergekit and to `orthomerge merge --mergekit`.

Taken without a note, both make the same model. mergekit runs as in test_mergekit_parity.py.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml
from test_mergekit_parity import (
    PYTHON,
    difference,
    llama,
    make_adapters,
    pytestmark,  # noqa: F401  (slow, and skipped without mergekit)
    weights,
)

from orthomerge.adapters import merge_adapters
from orthomerge.mergekit import read_mergekit

_DRIVER = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
cache, runs = json.load(sys.stdin)
options = MergeOptions(
    copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0, lora_merge_cache=cache
)
for name, config in runs.items():
    run_merge(MergeConfiguration.model_validate(config), name, options)
"""

W = [0.7, 1.3, 0.4]
CONFIGS = {  # method, weights, parameters of all, parameters of each
    "linear": ("linear", W, {}, {}),
    "linear to one": ("linear", [0.5, 0.2, 0.3], {"normalize": False}, {}),
    "task_arithmetic": ("task_arithmetic", W, {"lambda": 0.6}, {}),
    "task_arithmetic normalized": ("task_arithmetic", W, {"normalize": True, "lambda": 0.5}, {}),
    "ties": ("ties", [0.5] * 3, {"lambda": 0.6}, {"density": 0.45}),
    "ties of all": ("ties", [1.0] * 3, {"density": 0.45, "int8_mask": True}, {}),
    "dare_linear": ("dare_linear", W, {"normalize": True}, {}),
    "dare_ties": ("dare_ties", [1.0] * 3, {"normalize": True}, {}),
    "della": ("della", [2.0] * 3, {"lambda": 0.3}, {"epsilon": 0.1}),
    "della_linear": ("della_linear", W, {}, {}),
    "breadcrumbs": ("breadcrumbs", W, {"lambda": 0.8}, {"density": 0.45, "gamma": 0.03}),
    "breadcrumbs_ties": ("breadcrumbs_ties", [1.0] * 3, {"normalize": True}, {"density": 0.45}),
    "sce": ("sce", None, {"select_topk": 0.3}, {}),
    "model_stock": ("model_stock", None, {}, {}),
    "nuslerp": ("nuslerp", W[:2], {}, {}),
}


def config(folder, name, *, base_among=False):
    method, given, shared, own = CONFIGS[name]
    count = len(given) if given else 3
    models = [
        {"model": f"{folder}/base+{folder}/a{n}", "parameters": dict(own)} for n in range(count)
    ]
    for item, weight in zip(models, given or [], strict=False):
        item["parameters"]["weight"] = weight
    if base_among:
        more = {"parameters": {"weight": 0.9}} if method == "linear" else {}
        models.append({"model": f"{folder}/base", **more})
    found = {"merge_method": method, "models": models, "parameters": shared, "dtype": "float64"}
    if base_among or method != "linear":  # to mergekit's linear a base is one more model
        found["base_model"] = f"{folder}/base"
    return found


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mergekit-files")
    llama().save_pretrained(folder / "base")
    make_adapters(folder)
    found = {name: config(folder, name) for name in CONFIGS}
    found |= {
        f"{n} beside the base": config(folder, n, base_among=True) for n in ("linear", "ties")
    }
    for name, value in found.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    runs = {str(folder / "out" / name): value for name, value in found.items()}
    asked = json.dumps([str(folder / "cache"), runs])
    done = subprocess.run(
        [str(PYTHON), "-c", _DRIVER], input=asked, text=True, capture_output=True,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", [*CONFIGS, "linear beside the base", "ties beside the base"])
def test_one_file_makes_one_model(merged, name):
    plan = read_mergekit(merged / f"{name}.yaml")
    assert [n for n in plan.notes if "float64" not in n and "dtype" not in n] == []
    ours = merge_adapters(plan.adapters, plan.config)
    theirs = difference(weights(merged / "out" / name), weights(merged / "base"))
    assert len(ours.layers) == 21
    for layer in ours.layers:
        gap = ours.dense(layer).double() - theirs[layer]
        # Adapters are kept in float32 by PEFT, so mergekit's own sum rounds them.
        assert float(gap.norm()) <= 1e-6 * float(theirs[layer].norm().clamp_min(1e-6)), layer
