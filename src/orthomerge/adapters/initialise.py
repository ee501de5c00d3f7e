"""Starts: where `A` begins. The orthogonal ones, PEFT's own, and the controls between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from orthomerge import linalg
from orthomerge.adapters.config import CONSTRAINTS, PEFT_START, OsrmConfig, settled
from orthomerge.adapters.constrain import (
    ADAPTER,
    EXCLUDED,
    PROJECTED,
    Directions,
    ExpertLora,
    lora_layers,
    write_excluded,
)
from orthomerge.adapters.files import Adapter, check_start
from orthomerge.adapters.penalty import PENALTY, Charges, penalty_charges, write_penalty
from orthomerge.adapters.solve import directions_of, layer_problems, rows_of
from orthomerge.errors import AdapterError, StatisticsError, SubspaceError, UnknownNameError
from orthomerge.io.documents import is_object
from orthomerge.io.files import atomic_path, derive_seed
from orthomerge.io.names import START
from orthomerge.records import record_of, seal, versions
from orthomerge.statistics import (
    Statistics,
    describe_model,
    linear_layers,
    split_targets,
    target_layers,
    target_names,
)
from orthomerge.subspace import Subspace, get_solver

# What PEFT trains and saves as the head of a sequence classifier.
_PEFT_HEADS = ("classifier", "score")


def new_lora(
    model: Any,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    task_type: str | None = None,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
    gaussian: bool = False,
) -> PeftModel:
    """A PEFT model with fresh LoRA layers by PEFT's own start, drawn under `seed`.

    `ranks` gives single layers (named below the head) a rank of their own; their alpha follows, so
    that the scaling is the same everywhere. `gaussian` draws `A` with PEFT's deviation 1/rank
    instead. With the task type SEQ_CLS the classification head is trained and saved, also where
    PEFT does not know it by its name, as T5's.

    Raises:
        UnknownNameError: a target matches no layer; the message names the linear layers.
    """
    target_layers(model, targets)
    modules, tensors = split_targets(model, target_names(model, targets))
    odd = {layer: r for layer, r in (ranks or {}).items() if r != rank}
    power = 0.5 if rslora else 1.0
    alphas = {layer: alpha * (r / rank) ** power for layer, r in odd.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (PEFT takes fractions too)
        lora_dropout=dropout,
        use_rslora=rslora,
        rank_pattern=odd,
        alpha_pattern=alphas,
        target_modules=modules,
        target_parameters=tensors or None,
        task_type=task_type,
        init_lora_weights="gaussian" if gaussian else True,
        modules_to_save=_unknown_heads(model) if task_type == "SEQ_CLS" else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def default_targets(model: Any) -> list[str]:
    """The layers that LoRA adapts in a model of this architecture by default: PEFT's choice.

    Raises:
        UnknownNameError: PEFT names none; the message has the model's linear layers.
    """
    kind = str(model.config.model_type)
    found = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, _MORE_TARGETS.get(kind))
    if isinstance(found, list):
        return found
    ends = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    raise UnknownNameError(
        f"PEFT names no layers to adapt by default in models of the type '{kind}': say which with "
        f"--targets, of {', '.join(ends)}, or 'all-linear'."
    )


_MORE_TARGETS = {"mpnet": ["q", "v"], "distilbert": ["q_lin", "v_lin"]}
"""As PEFT has it for their kin; it does not know these by name."""


def _unknown_heads(model: nn.Module) -> list[str] | None:
    """A classifier's heads by names that PEFT does not take for one."""
    backbone = getattr(model, "base_model_prefix", "")
    heads = [
        name
        for name, module in model.named_children()
        if name not in (backbone, *_PEFT_HEADS) and any(True for _ in module.parameters())
    ]
    return heads or None


def check_statistics(model: nn.Module, statistics: Statistics, name: str) -> None:
    """Refuse statistics of another model.

    Raises:
        StatisticsError: the hash of the model's configuration differs.
    """
    here = describe_model(model)
    if here["config_hash"] != statistics.meta.config_hash:
        raise StatisticsError(
            f"{name} was collected on '{statistics.meta.model_id}', which is another model than "
            f"'{here['model_id']}': collect it on this one."
        )


class Started(NamedTuple):
    """What an adapter was started with, and what its training has to obey.

    `chosen` is what the solver found, by layer (empty for PEFT's own start); `directions` are those
    that the constraint "project" excludes, `charges` what "penalty" charges for.
    """

    config: OsrmConfig
    chosen: Mapping[str, Subspace]
    directions: Directions | None = None
    charges: Charges | None = None


class Chosen(dict[str, Subspace]):
    """What was chosen, by layer, and the `config` it was chosen by."""

    def __init__(self, chosen: Mapping[str, Subspace], config: OsrmConfig) -> None:
        super().__init__(chosen)
        self.config = config


def initialize_osrm_weights(
    peft_model: PeftModel,
    others: Sequence[Statistics | str | Path],
    own: Statistics | str | Path | None = None,
    config: OsrmConfig | None = None,
    *,
    existing: Sequence[Adapter] = (),
    adapter_name: str = ADAPTER,
) -> Chosen:
    """Use it for a start alone, under any PEFT trainer; `orthomerge.prepare` also gives the
    callback that holds a training to the constraint.

    Sets every `A` into the subspace where the other tasks' inputs have least energy, `B` to 0.
    OSRM (arXiv 2505.22934, equation 4): `min ‖A H_otherᵀ‖²_F  s.t. A Aᵀ = I`. Nothing else of the
    model changes. Statistics are given as such or as files of them. Returns what was chosen, by
    layer, and as its `config` the solver and the constraint: without a `config` the paper's.

    `existing` are adapters of other tasks, trained already: a joint solver keeps away from the rows
    of their `A` and leaves them as they are. Without them it chooses for all tasks at once, in an
    order that depends on the statistics alone, so that every team comes to the same choice.
    What is drawn is drawn under `config.seed`, the layer and the others' energy, so that tasks
    which share a seed do not share their rows. With the solver "default" A and B stay as they are.

    Raises:
        StatisticsError: no others, statistics of another model, granularity or target set, or
            weights that are not one per task.
        SubspaceError: the rank is larger than the admissible subspace, or a solver that does not
            look at other adapters was given some.
        AdapterError: adapters that exist, but not at any of these layers.
    """
    found = config or OsrmConfig()
    kept = replace(found, constraint="init") if found.constraint == "penalty" else found
    started = start_adapter(
        peft_model, others, own, kept, existing=existing, adapter_name=adapter_name
    )
    return Chosen(started.chosen, found)


def start_adapter(
    peft_model: PeftModel,
    others: Sequence[Statistics | str | Path],
    own: Statistics | str | Path | None = None,
    config: OsrmConfig | None = None,
    *,
    existing: Sequence[Adapter] = (),
    adapter_name: str = ADAPTER,
) -> Started:
    """Start an adapter, and give along what its constraint is made of: each problem solved once.

    As `initialize_osrm_weights` in what it sets and refuses.

    Raises:
        StatisticsError, SubspaceError, AdapterError: as there, and what `penalty_charges` refuses.
    """
    config = config or settled(None, None, own)
    if not others:
        raise StatisticsError("an orthogonal start needs statistics of at least one other task.")
    read = [Statistics.of(item) for item in others]
    mine = Statistics.of(own) if own is not None else None
    _check_all(peft_model, read, mine, config)
    layers = lora_layers(peft_model, adapter_name)
    if config.constraint == "project":
        for name, layer in layers.items():
            if isinstance(layer, ExpertLora):
                raise AdapterError(PROJECTED.format(name))
    chosen: dict[str, Subspace] = {}
    directions = None
    if config.solver == PEFT_START:
        if existing:
            raise SubspaceError(
                f"the start '{PEFT_START}' does not look at other adapters: use 'joint'."
            )
    else:
        _check_solver(layers, config, mine, existing)
        problems = layer_problems(
            peft_model, read, mine, config, existing=existing, adapter_name=adapter_name
        )
        for name, problem in problems.items():
            chosen[name] = problem.solution
            if config.constraint == "project":
                _ = problem.directions
            problem.release()
        if config.constraint == "project":
            directions = directions_of(problems, config)
    charges = None
    if config.constraint == "penalty":
        charges = penalty_charges(peft_model, read, mine, config, adapter_name=adapter_name)
    for name, found in chosen.items():  # all of them or none
        _set(layers[name], adapter_name, found.basis)
    return Started(config, chosen, directions, charges)


def _check_solver(
    layers: Mapping[str, Any],
    config: OsrmConfig,
    own: Statistics | None,
    existing: Sequence[Adapter],
) -> None:
    """Refuse what the solver lacks, or does not look at."""
    solver = get_solver(config.solver)
    if existing and not solver.joint:
        raise SubspaceError(
            f"the solver '{solver.name}' does not look at other adapters: use 'joint'."
        )
    for adapter in existing:
        if all(rows_of([adapter], name) is None for name in layers):
            raise AdapterError(
                f"the existing adapter '{adapter.name}' adapts no layer that this start does "
                f"({next(iter(layers))}, say): it belongs to another model or other target modules."
            )
    if solver.needs_own and own is None:
        raise SubspaceError(
            f"the solver '{solver.name}' needs the task's own statistics: pass own=, or --own."
        )


def _check_all(
    model: nn.Module, others: Sequence[Statistics], own: Statistics | None, config: OsrmConfig
) -> None:
    if config.weights is not None and len(config.weights) != len(others):
        raise StatisticsError(
            f"{len(config.weights)} weights for {len(others)} other tasks: give one per task."
        )
    for index, item in enumerate([*others, own] if own is not None else others):
        check_statistics(model, item, f"statistics {index + 1}")
        item.require_match(others[0], mine=f"statistics {index + 1}", theirs="statistics 1")
        if item.meta.granularity != config.granularity:
            raise StatisticsError(
                f"statistics {index + 1} have granularity '{item.meta.granularity}', the start "
                f"asks for '{config.granularity}': collect them with --granularity "
                f"{config.granularity}."
            )


def unit_rows(peft_model: PeftModel, *, adapter_name: str = ADAPTER) -> None:
    """Rescale each row of every `A` to norm 1: PEFT's default start on equal terms with OSRM's."""
    for layer in lora_layers(peft_model, adapter_name).values():
        A = layer.lora_A[adapter_name].weight
        _set(layer, adapter_name, A.detach() / A.detach().norm(dim=1, keepdim=True))


def orthonormal_B(peft_model: PeftModel, *, seed: int = 0, adapter_name: str = ADAPTER) -> None:
    """Set every `B` to random orthonormal columns and every `A` to 0, for training with `B` held.

    `ΔW = s B A` starts at zero as it must, and `A` learns. A start of `A` would be lost on it: an
    update that is zero at `A₀` is `s B (A - A₀)`, and AdamW moves the difference alike from
    everywhere. Each layer draws under `seed` and its name.
    """
    for name, layer in lora_layers(peft_model, adapter_name).items():
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        g = torch.Generator().manual_seed(derive_seed(seed, name))
        columns = torch.randn(B.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            A.zero_()
            B.copy_(linalg.qr(columns).Q)


def _set(layer: Any, adapter: str, rows: torch.Tensor) -> None:
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(rows)
        layer.lora_B[adapter].weight.zero_()


def save_start(
    peft_model: PeftModel,
    folder: str | Path,
    excluded: Directions | None = None,
    *,
    charges: Charges | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write a start as an ordinary PEFT folder, the fresh head of a classifier with it.

    PEFT refuses to load a classification adapter that lacks its head, so the head is kept; it
    loads with `PeftModel.from_pretrained(model, folder, is_trainable=True)` on a model with as
    many labels. `excluded` are the directions a projected `A` stays out of
    (`excluded_directions`); they lie beside the weights, where `read_excluded` finds them, as what
    a penalty charges for does (`charges`, `read_penalty`). A `record` (`start_record`) becomes part
    of `start.json`, which holds the hashes of all files, for `verify`. A folder that orthomerge
    wrote is replaced.

    Raises:
        OutputError: the folder holds what orthomerge did not write.
    """
    with atomic_path(folder) as path:
        # Embeddings are never adapted here; left to itself PEFT asks the hub whether they changed.
        peft_model.save_pretrained(str(path), save_embedding_layers=False)
        if excluded is not None:
            write_excluded(path, excluded)
        if charges is not None:
            write_penalty(path, charges)
        seal(path, START, {"versions": versions()} if record is None else record)
    return Path(folder)


def load_trainable(model: Any, folder: str | Path) -> PeftModel:
    """A base model with the adapter of `folder` on it, ready to train.

    Raises:
        AdapterError: weights that are pickled or no safetensors, or ranks that the configuration
            names and no matrix of the file could have: PEFT would take the memory for them first.
    """
    check_start(Path(folder))
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def constraint_of(start: str | Path) -> str:
    """The constraint that a start was made for: what its `start.json` says, else its files.

    Raises:
        AdapterError: a record that cannot be read, or that names no constraint there is.
    """
    folder = Path(start)
    if (folder / START).is_file():
        config = record_of(folder, START).get("config")
        said = config.get("constraint") if is_object(config) else None
        if said is not None and said not in CONSTRAINTS:
            raise AdapterError(
                f"'{folder / START}' names the constraint '{said}', which there is not: it was "
                "altered, or written by a newer version."
            )
        if said is not None:
            return str(said)
    return next((c for c, f in _CARRIED.items() if (folder / f).is_file()), "init")


# The files by which a start without a record says what it is for.
_CARRIED = {"penalty": PENALTY, "project": EXCLUDED}


def captured(chosen: Mapping[str, Subspace]) -> dict[str, dict[str, float | None]]:
    """Captured energies by layer, as plain numbers for a file or a table."""
    return {
        name: {"other": item.captured_other, "own": item.captured_own}
        for name, item in chosen.items()
    }
