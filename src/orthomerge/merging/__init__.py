"""Merge LoRA adapters from their factors: a registry of pure functions, one idea a file."""

from orthomerge.merging.merge import iter_merge, merge_layers
from orthomerge.merging.merged import MergedLayer, MergedUpdate
from orthomerge.merging.plan import MergePlan, layer_seed, plan_merge
from orthomerge.merging.registry import (
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
from orthomerge.merging.task_arithmetic import task_arithmetic
from orthomerge.merging.svd import svd
from orthomerge.merging.ties import ties
from orthomerge.merging.dare import dare_linear, dare_ties
from orthomerge.merging.magnitude_prune import magnitude_prune
from orthomerge.merging.breadcrumbs import breadcrumbs
from orthomerge.merging.della import della
from orthomerge.merging.sce import sce
from orthomerge.merging.tall_masks import consensus_ta, tall_masks
from orthomerge.merging.emr import emr
from orthomerge.merging.slerp import slerp
from orthomerge.merging.model_stock import model_stock
from orthomerge.merging.tsv_m import tsv_m
from orthomerge.merging.iso_c import iso_c
from orthomerge.merging.iso_cts import iso_cts
from orthomerge.merging.knots import knots_dare_ties, knots_ta, knots_ties
from orthomerge.merging.core_space import core_space
from orthomerge.merging.pico import pico
from orthomerge.merging.lora_lego import lora_lego
from orthomerge.merging.robust_merge import robust_merge
from orthomerge.merging.wudi import wudi
from orthomerge.merging.regmean import regmean
from orthomerge.merging.osrm_aware import osrm_aware
from orthomerge.merging.fisher import fisher
from orthomerge.merging.compose import compose
# isort: on

__all__ = [
    "MergeMethod",
    "MergePlan",
    "MergedLayer",
    "MergedUpdate",
    "PerTask",
    "Truncated",
    "Update",
    "breadcrumbs",
    "compose",
    "consensus_ta",
    "core_space",
    "dare_linear",
    "dare_ties",
    "della",
    "emr",
    "fisher",
    "get_method",
    "iso_c",
    "iso_cts",
    "iter_merge",
    "knots_dare_ties",
    "knots_ta",
    "knots_ties",
    "layer_seed",
    "linear",
    "list_methods",
    "lora_lego",
    "magnitude_prune",
    "merge_layers",
    "model_stock",
    "osrm_aware",
    "pico",
    "plan_merge",
    "register",
    "regmean",
    "robust_merge",
    "sce",
    "slerp",
    "svd",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
]
