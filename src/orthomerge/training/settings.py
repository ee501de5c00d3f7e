"""How a training runs, in our words and in those of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import TrainingArguments

from orthomerge.errors import OrthomergeError
from orthomerge.models.loading import Precision, preferred_device


@dataclass(frozen=True)
class TrainingSettings:
    """The paper's defaults, sized for a small encoder (AdamW, linear schedule, 6 % warm-up).

    `precision` "bf16" holds the frozen base in bfloat16, computes under autocast and keeps what is
    trained in float32; "float32" adds nothing to the type the base was loaded in. `accumulate` cuts
    a batch into so many passes.
    `max_steps` ends a training early or late, whatever the epochs say. `base_dropout` is that of
    the base's own layers; None keeps what its configuration says. Use 0 with the constraint
    "penalty": the noise of dropout drowns the penalty's gradient in AdamW's scaling.
    """

    epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.06
    max_length: int = 48
    precision: Precision = "float32"
    accumulate: int = 1
    max_steps: int | None = None
    base_dropout: float | None = None


def trainer_arguments(
    settings: TrainingSettings,
    scratch: str,
    *,
    steps: int,
    world: int,
    seed: int,
    trackers: Sequence[str],
    label: str,
) -> TrainingArguments:
    """What the Trainer is given in each of `world` processes; its files go into `scratch`.

    The loss is kept of the first step and of every ten, of fewer in a training of few `steps`.

    Raises:
        OrthomergeError: the batch cannot be shared among the processes.
    """
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=_rows_a_pass(settings, world),
        gradient_accumulation_steps=settings.accumulate,
        bf16=settings.precision == "bf16",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        # A value below one is a share of all steps.
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        train_sampling_strategy="group_by_length",
        logging_first_step=True,
        logging_steps=10 if steps >= 20 else max(1, steps // 2),
        logging_nan_inf_filter=False,
        save_strategy="no",  # `Checkpoints` asks for them
        save_total_limit=2,
        report_to=list(trackers) or "none",
        run_name=label,
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=False,
        # Otherwise the Trainer would take each process without a GPU for the only one.
        use_cpu=preferred_device().type == "cpu",
    )


def planned_steps(settings: TrainingSettings, rows: int) -> int:
    """How many steps a training on so many rows takes."""
    a_pass = max(1, math.ceil(rows / settings.batch_size))
    return settings.max_steps or max(1, math.ceil(a_pass * settings.epochs))


def _rows_a_pass(settings: TrainingSettings, world: int) -> int:
    """Rows of one pass of one process: processes share a batch, they do not enlarge it.

    Raises:
        OrthomergeError: the batch cannot be cut into so many equal parts.
    """
    parts = settings.accumulate * world
    if settings.batch_size % parts:
        raise OrthomergeError(
            f"a batch of {settings.batch_size} rows cannot be cut into {parts} equal parts "
            f"({world} processes, {settings.accumulate} passes): choose a batch size that can."
        )
    return settings.batch_size // parts
