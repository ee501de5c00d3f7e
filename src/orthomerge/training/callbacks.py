"""Constraints for any trainer that takes Transformers callbacks: Trainer, TRL's trainers, ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orthomerge.adapters import (
    Adapter,
    OsrmConfig,
    Projection,
    default_config,
    freeze_A,
    kept_out_directions,
    lora_layers,
)
from orthomerge.errors import AdapterError
from orthomerge.statistics import Statistics


class ProjectionCallback(TrainerCallback):
    """Keeps every `A` out of its directions after each optimizer step of a Trainer."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The start itself obeys."""
        self._projection.apply()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project what the step moved."""
        self._projection.apply()


class OsrmCallback(TrainerCallback):
    """Holds a training to the constraint of an `OsrmConfig`, beside `initialize_osrm_weights`.

    It takes what that call took: "freeze" holds every `A` from here on, "project" keeps it out of
    the others' loud directions after each optimizer step (`A ← A (I − P)`), "init" does nothing.

    Raises:
        StatisticsError: no others, or a file of theirs that cannot be read.
        SubspaceError: a room smaller than the rank or larger than the layer.
        AdapterError: a model without LoRA layers; or, when training begins, a trainer that trains
            another model than this one.
    """

    def __init__(
        self,
        peft_model: Any,
        others: Sequence[Statistics | str | Path],
        own: Statistics | str | Path | None = None,
        config: OsrmConfig | None = None,
        *,
        existing: Sequence[Adapter] = (),
        adapter_name: str = "default",
    ) -> None:
        config = config or default_config(own)
        layers = lora_layers(peft_model, adapter_name)
        self._held = [layer.lora_A[adapter_name].weight for layer in layers.values()]
        self._projection: Projection | None = None
        if config.constraint == "freeze":
            freeze_A(peft_model, adapter_name=adapter_name)
        elif config.constraint == "project":
            directions = kept_out_directions(
                peft_model, others, own, config, existing=existing, adapter_name=adapter_name
            )
            self._projection = Projection(peft_model, directions, adapter_name=adapter_name)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any
    ) -> None:
        """The start itself obeys; a model that was wrapped anew would escape."""
        trained = {id(parameter) for parameter in model.parameters()} if model is not None else None
        if trained is not None and not all(id(A) in trained for A in self._held):
            raise AdapterError(
                "the trainer trains another model than the callback holds: give both the same PEFT "
                "model, and the trainer no peft_config."
            )
        if self._projection is not None:
            self._projection.apply()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project what the step moved."""
        if self._projection is not None:
            self._projection.apply()
