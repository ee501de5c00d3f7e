"""The only place that imports peft: adapters read, written, started and merged."""

from orthomerge.adapters.config import CONSTRAINTS, OsrmConfig
from orthomerge.adapters.files import (
    HEADS,
    Adapter,
    as_factors,
    read_adapter,
    read_head,
    require_same_base,
    write_adapter,
)
from orthomerge.adapters.initialise import (
    captured,
    check_statistics,
    freeze_A,
    initialize_osrm_weights,
    load_trainable,
    lora_layers,
    new_lora,
    save_start,
    unit_rows,
)
from orthomerge.adapters.merge import merge_adapters, save_merged

__all__ = [
    "CONSTRAINTS",
    "HEADS",
    "Adapter",
    "OsrmConfig",
    "as_factors",
    "captured",
    "check_statistics",
    "freeze_A",
    "initialize_osrm_weights",
    "load_trainable",
    "lora_layers",
    "merge_adapters",
    "new_lora",
    "read_adapter",
    "read_head",
    "require_same_base",
    "save_merged",
    "save_start",
    "unit_rows",
    "write_adapter",
]
