"""Constraints for any trainer that takes Transformers callbacks: Trainer, TRL's trainers, ours."""

from __future__ import annotations

import logging
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
    Charges,
    OsrmConfig,
    Penalty,
    Projection,
    Started,
    constraint_of,
    excluded_directions,
    freeze_A,
    lora_modules,
    penalty_charges,
    read_excluded,
    read_penalty,
    settled,
    start_adapter,
)
from orthomerge.errors import AdapterError
from orthomerge.io.files import write_json
from orthomerge.io.names import TRAINING
from orthomerge.statistics import Statistics

_log = logging.getLogger("orthomerge")


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

    @property
    def value(self) -> Tensor:
        """The mean of P over layers, as the model is now."""
        return self._penalty.value()

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
        """Put the mean of P since the last log beside the loss, for every tracker after this."""
        if not self._values or logs is None or "loss" not in logs:
            return
        logs["penalty"] = float(torch.stack(self._values).mean())
        self._values.clear()
        self.history.append((int(state.global_step), logs["penalty"]))
        if state.log_history:
            state.log_history[-1]["penalty"] = logs["penalty"]


def trained_under(constraint: str, charges: Charges | None) -> dict[str, Any]:
    """What `training.json` says of a training's constraint, with λ of a penalty."""
    strength = {} if charges is None else {"strength": charges.strength}
    return {"constraint": constraint, **strength}


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
    """Holds a training to the constraint of an `OsrmConfig`; `prepare` starts the adapter too.

    Made by hand it goes beside `initialize_osrm_weights` and takes what that call took, and
    `OsrmCallback.from_start` obeys the folder that `orthomerge init` wrote. "freeze" holds every
    `A` from here on, "project" keeps it out of the others' dominant directions after each
    optimizer step (`A ← A (I − P)`), "penalty" adds the gradient of what the update does to the
    others' outputs (`PenaltyCallback`), "init" does nothing. Checkpoints say the constraint beside
    the adapter (`training.json`); `record` writes it into a folder that was saved by hand.

    `started` has the solver, the constraint and what was chosen; None after `from_start`.

    Raises:
        StatisticsError: no others, or a file of theirs that cannot be read.
        SubspaceError: a room smaller than the rank or larger than the layer.
        AdapterError: a model without LoRA layers, or an update that "penalty" does not cover; or,
            when training begins, a trainer that trains another model than this one, or that cuts
            A and B into parts.
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
        config = config or settled(None, None, own)
        started = Started(config, {})
        if config.constraint == "project":
            directions = excluded_directions(
                peft_model, others, own, config, existing=existing, adapter_name=adapter_name
            )
            started = started._replace(directions=directions)
        elif config.constraint == "penalty":
            charges = penalty_charges(peft_model, others, own, config, adapter_name=adapter_name)
            started = started._replace(charges=charges)
        self._obey(peft_model, config.constraint, started, adapter_name)

    @classmethod
    def from_start(
        cls,
        peft_model: Any,
        start: str | Path,
        *,
        strength: float | None = None,
        adapter_name: str = "default",
    ) -> OsrmCallback:
        """The constraint of a start folder, for the model that was loaded from it.

        `strength` takes the place of the one that the start carries.

        Raises:
            AdapterError: a start whose files cannot be read, or are of another model.
        """
        constraint = constraint_of(start)
        held = Started(
            OsrmConfig(),
            {},
            read_excluded(start) if constraint == "project" else None,
            read_penalty(start, strength) if constraint == "penalty" else None,
        )
        self = cls.__new__(cls)
        self._obey(peft_model, constraint, held, adapter_name)
        self.started = None
        return self

    @classmethod
    def of(
        cls, peft_model: Any, started: Started, *, adapter_name: str = "default"
    ) -> OsrmCallback:
        """The constraint of an adapter that `start_adapter` started."""
        self = cls.__new__(cls)
        self._obey(peft_model, started.config.constraint, started, adapter_name)
        return self

    def _obey(self, peft_model: Any, constraint: str, started: Started, name: str) -> None:
        layers = lora_modules(peft_model, name)
        self._held = [layer.lora_A[name].weight for layer in layers.values()]
        self._projection: Projection | None = None
        self.started: Started | None = started
        self.penalty: PenaltyCallback | None = None
        if constraint == "freeze":
            freeze_A(peft_model, adapter_name=name)
        if started.directions is not None:
            self._projection = Projection(peft_model, started.directions, adapter_name=name)
        if started.charges is not None:
            self.penalty = PenaltyCallback(Penalty(peft_model, started.charges, adapter_name=name))
        self.trained = trained_under(constraint, started.charges)

    def record(self, folder: str | Path) -> None:
        """Say in an adapter's folder under which constraint it was trained.

        The file holds no hashes: what is not orthomerge's own work is not to be replaced by it.
        """
        history = [] if self.penalty is None else self.penalty.history
        penalties = {"penalties": history} if history else {}
        write_json(Path(folder) / TRAINING, {**penalties, **self.trained})

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any
    ) -> None:
        """The start itself obeys; a model that was wrapped anew would escape."""
        if self._projection is not None or self.penalty is not None:
            require_whole(self.trained["constraint"])
        trained = {id(parameter) for parameter in model.parameters()} if model is not None else None
        if trained is not None and not all(id(A) in trained for A in self._held):
            raise AdapterError(
                "the trainer trains another model than the callback holds: give both the same PEFT "
                "model, and the trainer no peft_config."
            )
        if self._projection is not None:
            self._projection.apply()

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

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say the constraint beside the adapter of a checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.record(folder)


def prepare(
    peft_model: Any,
    others: Sequence[Statistics | str | Path],
    own: Statistics | str | Path | None = None,
    config: OsrmConfig | None = None,
    *,
    existing: Sequence[Adapter] = (),
    adapter_name: str = "default",
) -> OsrmCallback:
    """Start an adapter and get the callback that holds its training to the constraint, in one call.

    Give what it returns to a Trainer (`callbacks=[...]`): Transformers', TRL's, or any that takes
    Transformers callbacks. `initialize_osrm_weights` says what is set; each layer input is solved
    once for the start and the constraint. Which solver and constraint that were is in
    `.started.config`, and in a message of the logger "orthomerge". Without a `config` they are the
    recommended ones: PEFT's own start and the penalty.

    Raises:
        StatisticsError, SubspaceError, AdapterError: as `initialize_osrm_weights` and
            `OsrmCallback`.
    """
    started = start_adapter(
        peft_model, others, own, config, existing=existing, adapter_name=adapter_name
    )
    chosen = started.config
    _log.info("prepared: solver '%s', constraint '%s'", chosen.solver, chosen.constraint)
    return OsrmCallback.of(peft_model, started, adapter_name=adapter_name)
