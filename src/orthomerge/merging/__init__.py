"""Merge LoRA adapters from their factors: a registry of pure functions, one idea a file."""

from typing import Any

from orthomerge.merging.config import (
    AUTO,
    ENERGY,
    FULL,
    HEADS,
    SUM,
    LayerWeights,
    MergeConfig,
    Weights,
)
from orthomerge.merging.merge import iter_merge, merge_layers
from orthomerge.merging.merged import MergedLayer, MergedUpdate
from orthomerge.merging.plan import MergePlan, layer_seed, plan_merge
from orthomerge.merging.registry import (
    DefaultWeight,
    MergeMethod,
    PerTask,
    Truncated,
    Update,
    get_method,
    list_methods,
    register,
)

# Registration happens on import; the order here is the order of `list_methods`.
# isort: off
from orthomerge.merging.linear import linear
from orthomerge.merging.svd import svd
from orthomerge.merging.elementwise import ROWS
from orthomerge.merging.compose import compose
from orthomerge.merging.tall_masks import consensus_ta, tall_masks
from orthomerge.merging.emr import emr
from orthomerge.merging.slerp import slerp
from orthomerge.merging.model_stock import model_stock
from orthomerge.merging.tsv_m import tsv_m
from orthomerge.merging.iso_c import iso_c
from orthomerge.merging.iso_cts import iso_cts
from orthomerge.merging.core_space import core_space
from orthomerge.merging.ctm import ctm
from orthomerge.merging.pico import pico
from orthomerge.merging.lora_lego import lora_lego
from orthomerge.merging.robust_merge import robust_merge
from orthomerge.merging.wudi import wudi
from orthomerge.merging.regmean import regmean
from orthomerge.merging.osrm_aware import osrm_aware
from orthomerge.merging.fisher import fisher
# isort: on

__all__ = [
    "AUTO",
    "ENERGY",
    "FULL",
    "HEADS",
    "ROWS",
    "SUM",
    "DefaultWeight",
    "LayerWeights",
    "MergeConfig",
    "MergeMethod",
    "MergePlan",
    "MergedLayer",
    "MergedUpdate",
    "PerTask",
    "Truncated",
    "Update",
    "Weights",
    "compose",
    "consensus_ta",
    "core_space",
    "ctm",
    "emr",
    "fisher",
    "get_method",
    "iso_c",
    "iso_cts",
    "iter_merge",
    "layer_seed",
    "linear",
    "list_methods",
    "lora_lego",
    "merge_layers",
    "model_stock",
    "osrm_aware",
    "pico",
    "plan_merge",
    "register",
    "regmean",
    "robust_merge",
    "slerp",
    "svd",
    "tall_masks",
    "tsv_m",
    "wudi",
]


def __getattr__(name: str) -> Any:
    """The function of a method that has no file of its own: a row of the table, an alias."""
    if name in {"cat", "task_arithmetic", "knots_ta", *(row.name for row in ROWS)}:
        return get_method(name).function
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
