"""The only place that imports peft: adapters read, written, started and merged."""

from orthomerge.adapters.align import align_adapters
from orthomerge.adapters.config import (
    CONSTRAINTS,
    CONVERT_SHARE,
    FROZEN_B,
    PEFT_START,
    PENALTY_MOMENTS,
    RECOMMENDED,
    REFITS,
    SHARE,
    STRENGTH,
    SUBSPACES,
    ConvertConfig,
    OsrmConfig,
    check_penalty,
    settled,
)
from orthomerge.adapters.constrain import (
    KEPT_OUT,
    Directions,
    Projection,
    freeze_A,
    freeze_B,
    lora_layers,
    read_kept_out,
)
from orthomerge.adapters.convert import (
    RECORD,
    Converted,
    convert_adapters,
    described,
    total_loss,
)
from orthomerge.adapters.distilled import save_distilled
from orthomerge.adapters.files import (
    Adapter,
    read_adapter,
    read_head,
    require_form,
    require_same_base,
)
from orthomerge.adapters.full_model import save_full_model
from orthomerge.adapters.heads import POLICIES
from orthomerge.adapters.initialise import (
    Chosen,
    Started,
    captured,
    check_statistics,
    constraint_of,
    default_targets,
    initialize_osrm_weights,
    load_trainable,
    new_lora,
    orthonormal_B,
    save_start,
    start_adapter,
    unit_rows,
)
from orthomerge.adapters.loaded import merge_loaded_adapters, read_loaded
from orthomerge.adapters.merge import merge_adapters, merge_to_model, save_merged
from orthomerge.adapters.penalty import (
    PENALTY,
    Charge,
    Charges,
    Penalty,
    penalty_charges,
    read_penalty,
)
from orthomerge.adapters.redo import verify
from orthomerge.adapters.solve import kept_out_directions, plan_ranks
from orthomerge.adapters.statistics import Needed, of_one_model, read_needed
from orthomerge.adapters.trained import Trained, read_trained, write_training
from orthomerge.adapters.write import as_factors
from orthomerge.io.tensors import require_finite

__all__ = [
    "CONSTRAINTS",
    "CONVERT_SHARE",
    "FROZEN_B",
    "KEPT_OUT",
    "PEFT_START",
    "PENALTY",
    "PENALTY_MOMENTS",
    "POLICIES",
    "RECOMMENDED",
    "RECORD",
    "REFITS",
    "SHARE",
    "STRENGTH",
    "SUBSPACES",
    "Adapter",
    "Charge",
    "Charges",
    "Chosen",
    "ConvertConfig",
    "Converted",
    "Directions",
    "Needed",
    "OsrmConfig",
    "Penalty",
    "Projection",
    "Started",
    "Trained",
    "align_adapters",
    "as_factors",
    "captured",
    "check_penalty",
    "check_statistics",
    "constraint_of",
    "convert_adapters",
    "default_targets",
    "described",
    "freeze_A",
    "freeze_B",
    "initialize_osrm_weights",
    "kept_out_directions",
    "load_trainable",
    "lora_layers",
    "merge_adapters",
    "merge_loaded_adapters",
    "merge_to_model",
    "new_lora",
    "of_one_model",
    "orthonormal_B",
    "penalty_charges",
    "plan_ranks",
    "read_adapter",
    "read_head",
    "read_kept_out",
    "read_loaded",
    "read_needed",
    "read_penalty",
    "read_trained",
    "require_finite",
    "require_form",
    "require_same_base",
    "save_distilled",
    "save_full_model",
    "save_merged",
    "save_start",
    "settled",
    "start_adapter",
    "total_loss",
    "unit_rows",
    "verify",
    "write_training",
]
