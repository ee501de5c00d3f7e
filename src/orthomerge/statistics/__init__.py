"""Second moments of layer inputs: streaming collection and the file that carries them."""

# pyright: reportUnusedImport=false

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.statistics.collect import collect_statistics
    from orthomerge.statistics.collector import GRANULARITIES, FeatureCollector
    from orthomerge.statistics.distributed import end_processes, failing_together
    from orthomerge.statistics.experts import Expert
    from orthomerge.statistics.file import (
        SUFFIX,
        Statistics,
        combined_moment,
        merge_statistics,
    )
    from orthomerge.statistics.inspection import (
        InputSummary,
        Spectrum,
        disclosure,
        layer_label,
        spectrum,
        summarize,
    )
    from orthomerge.statistics.layers import (
        backbone,
        layer_shape,
        linear_layers,
        split_targets,
        target_layers,
        target_names,
    )

    # The name of version 0.1, for one release.
    from orthomerge.statistics.layers import backbone as trunk  # noqa: F401
    from orthomerge.statistics.meta import StatisticsMeta, describe_model
    from orthomerge.statistics.text import batches, read_texts, sample_texts

__all__ = [
    "GRANULARITIES",
    "SUFFIX",
    "Expert",
    "FeatureCollector",
    "InputSummary",
    "Spectrum",
    "Statistics",
    "StatisticsMeta",
    "backbone",
    "batches",
    "collect_statistics",
    "combined_moment",
    "describe_model",
    "disclosure",
    "end_processes",
    "failing_together",
    "layer_label",
    "layer_shape",
    "linear_layers",
    "merge_statistics",
    "read_texts",
    "sample_texts",
    "spectrum",
    "split_targets",
    "summarize",
    "target_layers",
    "target_names",
]

__getattr__ = first_use(__name__)
