"""Second moments of layer inputs: streaming collection and the file that carries them."""

from orthomerge.features.collect import collect_statistics
from orthomerge.features.collector import GRANULARITIES, FeatureCollector
from orthomerge.features.distributed import end_processes, failing_together
from orthomerge.features.inspection import (
    InputSummary,
    Spectrum,
    disclosure,
    layer_label,
    spectrum,
    summarize,
)
from orthomerge.features.layers import linear_layers, target_layers, trunk
from orthomerge.features.meta import StatisticsMeta, describe_model
from orthomerge.features.statistics import (
    SUFFIX,
    Statistics,
    combined_moment,
    merge_statistics,
)
from orthomerge.features.text import batches, read_texts, sample_texts

__all__ = [
    "GRANULARITIES",
    "SUFFIX",
    "FeatureCollector",
    "InputSummary",
    "Spectrum",
    "Statistics",
    "StatisticsMeta",
    "batches",
    "collect_statistics",
    "combined_moment",
    "describe_model",
    "disclosure",
    "end_processes",
    "failing_together",
    "layer_label",
    "linear_layers",
    "merge_statistics",
    "read_texts",
    "sample_texts",
    "spectrum",
    "summarize",
    "target_layers",
    "trunk",
]
