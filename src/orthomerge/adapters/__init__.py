"""The only place that imports peft: adapters read, written, started and merged."""

# pyright: reportUnusedImport=false

from __future__ import annotations

from typing import TYPE_CHECKING

from orthomerge.lazy import first_use

if TYPE_CHECKING:
    from orthomerge.adapters.align import align_adapters
    from orthomerge.adapters.behaviour import Behaviour, TaskBehaviour, verify_outputs
    from orthomerge.adapters.config import (
        CONSTRAINTS,
        CONVERT_ENERGY_FRACTION,
        ENERGY_FRACTION,
        FROZEN_B,
        OLD_NAMES,
        PEFT_START,
        PENALTY_MOMENTS,
        RECOMMENDED,
        REFITS,
        STRENGTH,
        SUBSPACES,
        ConvertConfig,
        OsrmConfig,
        check_penalty,
        settled,
    )
    from orthomerge.adapters.constrain import (
        EXCLUDED,
        Directions,
        Projection,
        freeze_A,
        freeze_B,
        lora_layers,
        lora_modules,
        read_excluded,
    )

    # The names of version 0.1, for one release.
    from orthomerge.adapters.constrain import EXCLUDED as KEPT_OUT  # noqa: F401
    from orthomerge.adapters.constrain import read_excluded as read_kept_out  # noqa: F401
    from orthomerge.adapters.convert import (
        RECORD,
        Converted,
        convert_adapters,
        described,
        total_loss,
    )
    from orthomerge.adapters.distilled import save_distilled
    from orthomerge.adapters.extract import Extracted, extract_adapter
    from orthomerge.adapters.files import (
        Adapter,
        base_of,
        read_adapter,
        read_head,
        require_form,
        require_same_base,
    )
    from orthomerge.adapters.formats import convert_format
    from orthomerge.adapters.full_model import save_full_model
    from orthomerge.adapters.heads import POLICIES, require_runnable
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
    from orthomerge.adapters.resize import resize_adapter
    from orthomerge.adapters.settings import check_folders
    from orthomerge.adapters.share import SharedAdapters, expand_shared, share_adapters
    from orthomerge.adapters.solve import excluded_directions, plan_ranks
    from orthomerge.adapters.solve import (
        excluded_directions as kept_out_directions,  # noqa: F401
    )
    from orthomerge.adapters.statistics import Needed, of_one_model, read_needed
    from orthomerge.adapters.write import as_factors
    from orthomerge.io.tensors import require_finite

__all__ = [
    "CONSTRAINTS",
    "CONVERT_ENERGY_FRACTION",
    "ENERGY_FRACTION",
    "EXCLUDED",
    "FROZEN_B",
    "OLD_NAMES",
    "PEFT_START",
    "PENALTY",
    "PENALTY_MOMENTS",
    "POLICIES",
    "RECOMMENDED",
    "RECORD",
    "REFITS",
    "STRENGTH",
    "SUBSPACES",
    "Adapter",
    "Behaviour",
    "Charge",
    "Charges",
    "Chosen",
    "ConvertConfig",
    "Converted",
    "Directions",
    "Extracted",
    "Needed",
    "OsrmConfig",
    "Penalty",
    "Projection",
    "SharedAdapters",
    "Started",
    "TaskBehaviour",
    "align_adapters",
    "as_factors",
    "base_of",
    "captured",
    "check_folders",
    "check_penalty",
    "check_statistics",
    "constraint_of",
    "convert_adapters",
    "convert_format",
    "default_targets",
    "described",
    "excluded_directions",
    "expand_shared",
    "extract_adapter",
    "freeze_A",
    "freeze_B",
    "initialize_osrm_weights",
    "load_trainable",
    "lora_layers",
    "lora_modules",
    "merge_adapters",
    "merge_loaded_adapters",
    "merge_to_model",
    "new_lora",
    "of_one_model",
    "orthonormal_B",
    "penalty_charges",
    "plan_ranks",
    "read_adapter",
    "read_excluded",
    "read_head",
    "read_loaded",
    "read_needed",
    "read_penalty",
    "require_finite",
    "require_form",
    "require_runnable",
    "require_same_base",
    "resize_adapter",
    "save_distilled",
    "save_full_model",
    "save_merged",
    "save_start",
    "settled",
    "share_adapters",
    "start_adapter",
    "total_loss",
    "unit_rows",
    "verify",
    "verify_outputs",
]

__getattr__ = first_use(__name__)
