"""Make LoRA adapters mergeable: orthogonal initialization before training, exact merging after it.

The names below are what a PEFT user needs; everything else is imported from its package
(`orthomerge.adapters`, `orthomerge.merging`, ...). They are imported when first used, so that
importing orthomerge does not load torch.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.adapters import (
        OsrmConfig,
        convert_adapters,
        initialize_osrm_weights,
        merge_adapters,
        merge_loaded_adapters,
        merge_to_model,
        verify,
    )
    from orthomerge.diagnostics import diagnose, interference
    from orthomerge.errors import OrthomergeError
    from orthomerge.merging import list_methods
    from orthomerge.statistics import Statistics, collect_statistics, merge_statistics
    from orthomerge.training.callbacks import OsrmCallback, prepare
    from orthomerge.training.distillation import distill_adapters

    __version__: str

PACKAGES = {
    "adapters": (
        "Adapter", "ConvertConfig", "Projection", "freeze_A", "read_adapter", "read_excluded",
    ),
    "diagnostics": ("Diagnosis", "Interference", "predict_shift"),
    "experiment": ("Recipe", "Run", "load_recipe"),
    "factors": ("LoraFactors",),
    "fisher": ("Fisher", "collect_fisher", "load_fisher"),
    "io.rows": ("ResultRow", "read_rows"),
    "merging": ("MergedUpdate", "iter_merge", "merge_layers"),
    "moments": ("Moment", "Representation", "RowMoment", "SecondMoment", "SketchMoment"),
    "subspace": ("Subspace", "get_solver", "list_solvers"),
    "tasks": ("Task", "get_task", "list_tasks"),
}  # fmt: skip
"""Public names by package. Version 0.1 had them here too, where they work for one release more."""

_OLD_HOME = {name: home for home, names in PACKAGES.items() for name in names}
_OLD_HOME["read_kept_out"] = "adapters"
_PACKAGES = {home.split(".")[0] for home in (*PACKAGES, "report", "statistics", "training")}

__all__ = [
    "OrthomergeError",
    "OsrmCallback",
    "OsrmConfig",
    "Statistics",
    "collect_statistics",
    "convert_adapters",
    "diagnose",
    "distill_adapters",
    "initialize_osrm_weights",
    "interference",
    "list_methods",
    "merge_adapters",
    "merge_loaded_adapters",
    "merge_statistics",
    "merge_to_model",
    "prepare",
    "verify",
]


_of_the_package = first_use(__name__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("orthomerge")
    if name in __all__:
        return _of_the_package(name)
    if name in _PACKAGES:
        return import_module(f"orthomerge.{name}")
    if name == "plots":
        _say_moved(name, "report.plots")
        return import_module("orthomerge.report.plots")
    if name in _OLD_HOME:
        _say_moved(name, f"{_OLD_HOME[name]}.{name}")
        return getattr(import_module(f"orthomerge.{_OLD_HOME[name]}"), name)
    raise AttributeError(f"module 'orthomerge' has no attribute '{name}'")


def _say_moved(name: str, home: str) -> None:
    warnings.warn(
        f"orthomerge.{name} is now orthomerge.{home}; the old name goes in the next release.",
        DeprecationWarning,
        stacklevel=3,
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
