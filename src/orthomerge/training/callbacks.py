"""Constraints for any trainer that takes Transformers callbacks: Trainer, TRL's trainers, ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, distributed
from transformers import TrainerCallback

from orthomerge.adapters import (
    Adapter,
    OsrmConfig,
    Penalty,
    Projection,
    default_config,
    freeze_A,
    kept_out_directions,
    lora_layers,
    penalty_charges,
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


class PenaltyCallback(TrainerCallback):
    """Adds a penalty's gradient to each optimizer step of a Trainer, and its value to the log.

    The gradient is put into `.grad` when a step begins, and the backward passes of the step add
    theirs to it. So it counts once however many passes a step accumulates, and what is clipped is
    the gradient of the whole loss. Under a `GradScaler` it is scaled like the others. Every process
    of several adds the same, and their mean is the same again.

    `history` holds pairs of a step and the mean of P since the last one that was logged; the log
    has it as `penalty`, without λ, beside the task's own `loss`.
    """

    def __init__(self, penalty: Penalty) -> None:
        self._penalty = penalty
        self._first = next((p for p in penalty.parameters if p.requires_grad), None)
        self._place: int | None = None
        self._values: list[Tensor] = []
        self.history: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cuts the factors into parts."""
        require_whole("penalty")

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Before the first backward pass of a step."""
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        self._values.append(self._penalty.add_gradients(scale))
        grad = None if self._first is None else self._first.grad
        self._place = None if grad is None else grad.data_ptr()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a trainer that cleared the gradients after the step began."""
        if self._first is None:
            return
        grad = self._first.grad
        several = distributed.is_available() and distributed.is_initialized()  # grads are moved
        if not several and (grad is None or grad.data_ptr() != self._place):
            raise AdapterError(
                "the trainer clears the gradients after a step has begun, and the penalty's with "
                "them: add it in a loop of your own (orthomerge.Penalty)."
            )

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **kwargs: Any):
        """The mean of P over the steps since the last log."""
        if not self._values or logs is None or "loss" not in logs:
            return
        mean = float(torch.stack(self._values).mean())
        self._values.clear()
        self.history.append((int(state.global_step), mean))
        logs["penalty"] = mean
        if state.log_history and state.log_history[-1] is not logs:
            state.log_history[-1]["penalty"] = mean


def require_whole(constraint: str) -> None:
    """Refuse FSDP and DeepSpeed, which cut A and B into parts.

    Raises:
        AdapterError: the processes of this training hold parts of the weights.
    """
    cuts = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if AcceleratorState().distributed_type in cuts:
        raise AdapterError(
            "FSDP and DeepSpeed cut A and B into parts, which the constraint "
            f"'{constraint}' cannot see whole: train with 'freeze' or 'init', or with plain "
            "data-parallel processes."
        )


class OsrmCallback(TrainerCallback):
    """Holds a training to the constraint of an `OsrmConfig`, beside `initialize_osrm_weights`.

    It takes what that call took: "freeze" holds every `A` from here on, "project" keeps it out of
    the others' loud directions after each optimizer step (`A ← A (I − P)`), "penalty" adds the
    gradient of what the update does to the others' outputs (`PenaltyCallback`), "init" does
    nothing.

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
        self.penalty: PenaltyCallback | None = None
        if config.constraint == "freeze":
            freeze_A(peft_model, adapter_name=adapter_name)
        elif config.constraint == "project":
            directions = kept_out_directions(
                peft_model, others, own, config, existing=existing, adapter_name=adapter_name
            )
            self._projection = Projection(peft_model, directions, adapter_name=adapter_name)
        elif config.constraint == "penalty":
            charges = penalty_charges(peft_model, others, own, config, adapter_name=adapter_name)
            self.penalty = PenaltyCallback(Penalty(peft_model, charges, adapter_name=adapter_name))

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
            require_whole("project")
            self._projection.apply()
        if self.penalty is not None:
            self.penalty.on_train_begin(args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient."""
        if self.penalty is not None:
            self.penalty.on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make sure that the penalty's gradient is there still."""
        if self.penalty is not None:
            self.penalty.on_pre_optimizer_step(args, state, control)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project what the step moved."""
        if self._projection is not None:
            self._projection.apply()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the penalty's value."""
        if self.penalty is not None:
            self.penalty.on_log(args, state, control, **kwargs)
