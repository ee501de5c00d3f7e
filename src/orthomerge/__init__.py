"""Make LoRA adapters mergeable: orthogonal starts before training, exact merging after it.

The names below are the whole public API. They are imported when first used, so that importing
orthomerge does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthomerge.adapters import (
        Adapter,
        ConvertConfig,
        OsrmConfig,
        Projection,
        convert_adapters,
        freeze_A,
        initialize_osrm_weights,
        merge_adapters,
        merge_to_model,
        read_adapter,
        read_kept_out,
        verify,
    )
    from orthomerge.diagnostics import (
        Diagnosis,
        Interference,
        diagnose,
        interference,
        predict_shift,
    )
    from orthomerge.errors import OrthomergeError
    from orthomerge.experiment import Recipe, Run, load_recipe
    from orthomerge.factors import LoraFactors
    from orthomerge.fisher import Fisher, collect_fisher, load_fisher
    from orthomerge.io.rows import ResultRow, read_rows
    from orthomerge.merging import MergedUpdate, iter_merge, list_methods, merge_layers
    from orthomerge.moments import Moment, Representation, RowMoment, SecondMoment, SketchMoment
    from orthomerge.report import plots
    from orthomerge.statistics import Statistics, collect_statistics, merge_statistics
    from orthomerge.subspace import Subspace, get_solver, list_solvers
    from orthomerge.tasks import Task, get_task, list_tasks
    from orthomerge.training.callbacks import OsrmCallback

    __version__: str

_HOMES = {
    "adapters": (
        "Adapter", "ConvertConfig", "OsrmConfig", "Projection", "convert_adapters", "freeze_A",
        "initialize_osrm_weights", "merge_adapters", "merge_to_model", "read_adapter",
        "read_kept_out", "verify",
    ),
    "training.callbacks": ("OsrmCallback",),
    "diagnostics": ("Diagnosis", "Interference", "diagnose", "interference", "predict_shift"),
    "errors": ("OrthomergeError",),
    "experiment": ("Recipe", "Run", "load_recipe"),
    "factors": ("LoraFactors",),
    "fisher": ("Fisher", "collect_fisher", "load_fisher"),
    "statistics": ("Statistics", "collect_statistics", "merge_statistics"),
    "merging": ("MergedUpdate", "iter_merge", "list_methods", "merge_layers"),
    "moments": ("Moment", "Representation", "RowMoment", "SecondMoment", "SketchMoment"),
    "io.rows": ("ResultRow", "read_rows"),
    "subspace": ("Subspace", "get_solver", "list_solvers"),
    "tasks": ("Task", "get_task", "list_tasks"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "ConvertConfig",
    "Diagnosis",
    "Fisher",
    "Interference",
    "LoraFactors",
    "MergedUpdate",
    "Moment",
    "OrthomergeError",
    "OsrmCallback",
    "OsrmConfig",
    "Projection",
    "Recipe",
    "Representation",
    "ResultRow",
    "RowMoment",
    "Run",
    "SecondMoment",
    "SketchMoment",
    "Statistics",
    "Subspace",
    "Task",
    "collect_fisher",
    "collect_statistics",
    "convert_adapters",
    "diagnose",
    "freeze_A",
    "get_solver",
    "get_task",
    "initialize_osrm_weights",
    "interference",
    "iter_merge",
    "list_methods",
    "list_solvers",
    "list_tasks",
    "load_fisher",
    "load_recipe",
    "merge_adapters",
    "merge_layers",
    "merge_statistics",
    "merge_to_model",
    "plots",
    "predict_shift",
    "read_adapter",
    "read_kept_out",
    "read_rows",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("orthomerge")
    if name == "plots":
        return import_module("orthomerge.report.plots")
    if name not in _HOME:
        raise AttributeError(f"module 'orthomerge' has no attribute '{name}'")
    return getattr(import_module(f"orthomerge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
