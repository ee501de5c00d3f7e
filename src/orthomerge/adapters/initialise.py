"""Starts: where `A` begins. The orthogonal ones, PEFT's own, and the controls between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from orthomerge.adapters.config import OsrmConfig
from orthomerge.errors import AdapterError, StatisticsError
from orthomerge.features import (
    Statistics,
    combined_moment,
    describe_model,
    target_layers,
    trunk,
)
from orthomerge.files import atomic_path, derive_seed
from orthomerge.subspace import Subspace, get_solver

ADAPTER = "default"


def lora_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Any]:
    """The LoRA layers of a PEFT model, by their name in the trunk.

    Raises:
        AdapterError: the model has no LoRA layer.
    """
    found = {
        name: module
        for name, module in trunk(model).named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    if not found:
        raise AdapterError(
            "the model has no LoRA layer: wrap it with peft.get_peft_model(model, LoraConfig(...))."
        )
    return found


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
) -> PeftModel:
    """A PEFT model with fresh LoRA layers by PEFT's own start, drawn under `seed`.

    Raises:
        UnknownNameError: a target matches no layer; the message names the linear layers.
    """
    target_layers(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (PEFT takes fractions too)
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=list(targets),
        task_type=task_type,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


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


def initialize_osrm_weights(
    peft_model: PeftModel,
    others: Sequence[Statistics],
    own: Statistics | None = None,
    config: OsrmConfig | None = None,
    *,
    adapter_name: str = ADAPTER,
) -> dict[str, Subspace]:
    """Set every `A` into the subspace where the other tasks' inputs have least energy, `B` to 0.

    OSRM (arXiv 2505.22934, equation 4): `min ‖A H_otherᵀ‖²_F  s.t. A Aᵀ = I`. Nothing else of the
    model changes, so any PEFT trainer goes on from here. Returns what was chosen, by layer.

    Raises:
        StatisticsError: no others, statistics of another model, granularity or target set.
        SubspaceError: the rank is larger than the admissible subspace.
    """
    config = config or OsrmConfig()
    if not others:
        raise StatisticsError("an orthogonal start needs statistics of at least one other task.")
    everyone = [*others, own] if own is not None else list(others)
    for index, item in enumerate(everyone):
        check_statistics(peft_model, item, f"statistics {index + 1}")
        item.require_match(others[0], mine=f"statistics {index + 1}", theirs="statistics 1")
        if item.meta.granularity != config.granularity:
            raise StatisticsError(
                f"statistics {index + 1} have granularity '{item.meta.granularity}', the start "
                f"asks for '{config.granularity}': collect them with --granularity "
                f"{config.granularity}."
            )
    solver = get_solver(config.solver)
    chosen: dict[str, Subspace] = {}
    layers = lora_layers(peft_model, adapter_name)
    solved: dict[tuple[str, int], Subspace] = {}
    for name, layer in layers.items():
        A = layer.lora_A[adapter_name].weight
        owner = others[0].layers.get(name, name)
        key = (owner, A.shape[0])
        if key not in solved:
            solved[key] = solver(
                combined_moment(others, name, config.weights),
                A.shape[0],
                own=own.second_moment(name) if own is not None else None,
                seed=derive_seed(config.seed, owner),
                **config.options,
            )
        chosen[name] = solved[key]
        _set(layer, adapter_name, chosen[name].basis)
    return chosen


def unit_rows(peft_model: PeftModel, *, adapter_name: str = ADAPTER) -> None:
    """Rescale each row of every `A` to norm 1: PEFT's default start on equal terms with OSRM's."""
    for layer in lora_layers(peft_model, adapter_name).values():
        A = layer.lora_A[adapter_name].weight
        _set(layer, adapter_name, A.detach() / A.detach().norm(dim=1, keepdim=True))


def _set(layer: Any, adapter: str, rows: torch.Tensor) -> None:
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(rows)
        layer.lora_B[adapter].weight.zero_()


def freeze_A(peft_model: PeftModel, *, adapter_name: str = ADAPTER) -> None:
    """Hold every `A` where it is; `B` and the head go on training."""
    for layer in lora_layers(peft_model, adapter_name).values():
        layer.lora_A[adapter_name].weight.requires_grad_(False)


def save_start(peft_model: PeftModel, folder: str | Path) -> Path:
    """Write a start as an ordinary PEFT folder, the fresh head of a classifier with it.

    PEFT refuses to load a classification adapter that lacks its head, so the head is kept; it
    loads with `PeftModel.from_pretrained(model, folder, is_trainable=True)` on a model with as
    many labels.
    """
    with atomic_path(folder) as path:
        # Embeddings are never adapted here; left to itself PEFT asks the hub whether they changed.
        peft_model.save_pretrained(str(path), save_embedding_layers=False)
    return Path(folder)


def load_trainable(model: Any, folder: str | Path) -> PeftModel:
    """A base model with the adapter of `folder` on it, ready to train."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def captured(chosen: Mapping[str, Subspace]) -> dict[str, dict[str, float | None]]:
    """Captured energies by layer, as plain numbers for a file or a table."""
    return {
        name: {"other": item.captured_other, "own": item.captured_own}
        for name, item in chosen.items()
    }
