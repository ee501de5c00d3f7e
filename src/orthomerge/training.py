"""One task trained by the Transformers Trainer, from a start folder to an adapter folder."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, distributed, nn
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from orthomerge.adapters import (
    CONSTRAINTS,
    FROZEN_B,
    KEPT_OUT,
    RECORD,
    Projection,
    freeze_A,
    freeze_B,
    load_trainable,
    read_kept_out,
    record_of,
    seal_again,
)
from orthomerge.callbacks import ProjectionCallback
from orthomerge.errors import OrthomergeError, unknown_name
from orthomerge.files import atomic_path, write_json
from orthomerge.models import agree_on_padding, encode, preferred_device, quiet
from orthomerge.prompting import Wording
from orthomerge.tasks import Prompt, Row
from orthomerge.tracking import following

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class TrainingSettings:
    """The paper's defaults, sized for a small encoder (AdamW, linear schedule, 6 % warm-up).

    `precision` "bf16" computes under autocast and keeps what is trained in float32; "float32" adds
    nothing to the type the base was loaded in. `accumulate` cuts a batch into so many passes.
    `max_steps` ends a training early or late, whatever the epochs say.
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


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(state.global_step, state.max_steps)


def train_adapter(
    model: Any,
    start: str | Path,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    regression: bool,
    settings: TrainingSettings,
    constraint: str = "init",
    fresh_head: bool = True,
    seed: int = 0,
    output: str | Path,
    prompt: Prompt | None = None,
    record: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    report_to: Sequence[str] = (),
    logs: str | Path | None = None,
    label: str | None = None,
) -> Path:
    """Train the adapter in `start` on `rows` and write it to `output`, its head with it.

    `model` is the base with the task's head; it is changed in place. With a `prompt` it is a
    language model, a decoder or an encoder-decoder, and learns to answer the prompt in words; loss
    is taken of the answer alone. `constraint="freeze"` holds A where the start put it, "project"
    keeps it out of the directions that the start carries, "freeze_B" holds B instead. A head that
    was trained before is no `fresh_head`. In a job of several processes each takes its share of
    every batch, and the first one writes. The order of the rows is drawn under `seed`; batches are
    grouped by length. `record` is kept beside the weights as `training.json`, together with the
    losses. `report_to` names what else follows the losses, "tensorboard", "wandb" or "mlflow", as
    the Trainer's option does; their files go into the folder `logs`, by default beside `output`,
    and call the training `label`, by default the output's name.

    Raises:
        UnknownNameError: no such constraint.
        OrthomergeError: the loss is not finite (the learning rate is too high), or the batch cannot
            be shared among the processes.
        AdapterError: the constraint "project" and a start that carries no directions, or
            "freeze_B" and one whose B is zero.
    """
    if constraint not in (*CONSTRAINTS, FROZEN_B):
        raise unknown_name("constraint", constraint, [*CONSTRAINTS, FROZEN_B])
    place = Path(logs or Path(output).parent / "logs")
    label = label or Path(output).name
    followed = following(report_to, place, label)
    peft_model = load_trainable(agree_on_padding(model, tokenizer), start)
    callbacks: list[TrainerCallback] = [_Progress(progress)] if progress else []
    if constraint == "freeze":
        freeze_A(peft_model)
    elif constraint == FROZEN_B:
        freeze_B(peft_model)
    elif constraint == "project":
        callbacks.append(ProjectionCallback(Projection(peft_model, read_kept_out(start))))
    if settings.precision == "bf16":
        for parameter in peft_model.parameters():
            if parameter.requires_grad:  # a head in the base's bfloat16 would not feel small steps
                parameter.data = parameter.data.float()
    if prompt is None:
        if regression and fresh_head:
            _start_at_the_mean(peft_model, [float(r.label) for r in rows])
        encoded = _labelled(rows, tokenizer, settings.max_length, regression=regression)
        collate: Any = DataCollatorWithPadding(tokenizer)
    else:
        wording = Wording.of(prompt, tokenizer, model.config, settings.max_length)
        encoded, collate = wording.examples(rows), wording.collate
    rank, world = _process()
    with tempfile.TemporaryDirectory() as scratch, quiet(), followed as trackers:
        arguments = TrainingArguments(
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
            logging_steps=10,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=trackers or "none",
            run_name=label,
            disable_tqdm=True,
            seed=seed,
            dataloader_pin_memory=False,
            # Not told so, the Trainer would take each process without a GPU for the only one.
            use_cpu=preferred_device().type == "cpu",
        )
        trainer = Trainer(
            model=peft_model,
            args=arguments,
            train_dataset=encoded,  # pyright: ignore[reportArgumentType]  (a list is a dataset)
            data_collator=collate,
            callbacks=callbacks,
        )
        # What takes a mean loss by itself, the Trainer would not divide by passes and processes.
        trainer.model_accepts_loss_kwargs = _sums_its_loss(model, prompt)
        trainer.remove_callback(PrinterCallback)
        if constraint == "project" and _cuts(trainer):
            raise OrthomergeError(
                "FSDP and DeepSpeed cut A into pieces, which the constraint 'project' cannot see "
                "whole: train with 'freeze' or 'init', or with plain data-parallel processes."
            )
        mean_loss = trainer.train().training_loss
        # Where weights are cut, all processes have to give their pieces before one can write.
        pieces: Any = trainer.accelerator
        whole = pieces.get_state_dict(trainer.model) if _cuts(trainer) else None
    losses = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    if not math.isfinite(mean_loss):
        raise OrthomergeError(
            f"training from '{start}' gave a loss that is not finite: lower the learning rate "
            f"({settings.learning_rate:g})."
        )
    peft_model.peft_config["default"].inference_mode = True
    if rank == 0:  # every process holds the same weights, or the first one the whole
        with atomic_path(output) as folder:
            peft_model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=whole)
            write_json(folder / "training.json", {**(record or {}), "losses": losses})
    if world > 1:
        distributed.barrier()
    return Path(output)


def _cuts(trainer: Trainer) -> bool:
    """Whether each process holds but a piece of the weights."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _sums_its_loss(model: Any, prompt: Prompt | None) -> bool:
    """Whether the model divides its loss by the items of the whole batch: decoders alone do."""
    return prompt is not None and not getattr(model.config, "is_encoder_decoder", False)


def recover_adapter(
    model: Any,
    converted: str | Path,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    regression: bool,
    settings: TrainingSettings,
    prompt: Prompt | None = None,
    seed: int = 0,
    output: str | Path,
    record: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train a converted adapter a few steps more, where its conversion put it; see `train_adapter`.

    `A` stays out of the directions that the conversion "project" left behind, and is held after any
    other. The conversion's own record goes along, with the hashes of what came out.

    Raises:
        OrthomergeError: a record that cannot be read, or what `train_adapter` raises.
    """
    converted = Path(converted)
    told = record_of(converted, RECORD) if (converted / RECORD).is_file() else None
    projected = (converted / KEPT_OUT).is_file()
    with atomic_path(output) as folder:
        train_adapter(
            model, converted, rows, tokenizer, regression=regression, settings=settings,
            constraint="project" if projected else "freeze", fresh_head=False, seed=seed,
            output=folder, prompt=prompt, record=record, progress=progress,
        )  # fmt: skip
        for name in ("README.md", KEPT_OUT):
            if (converted / name).is_file():
                shutil.copyfile(converted / name, folder / name)
        if told is not None:
            about = {"steps": settings.max_steps, **(record or {})}
            seal_again(told, folder, RECORD, recovered=about)
    return Path(output)


def _labelled(
    rows: Sequence[Row], tokenizer: Any, max_length: int, *, regression: bool
) -> list[dict[str, Any]]:
    """Rows as a classifier reads them, with their labels."""
    encoded = encode(tokenizer, [(r.text, r.pair) for r in rows], max_length)
    for features, row in zip(encoded, rows, strict=True):
        features["labels"] = float(row.label) if regression else int(row.label)
    return encoded


def _process() -> tuple[int, int]:
    """This process's number in a job of several, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


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


def _start_at_the_mean(model: nn.Module, labels: Sequence[float]) -> None:
    """Set a fresh regression head's bias to the labels' mean where that is far from zero.

    A few dozen steps of AdamW cannot carry the bias from 0 to, say, the 2.7 of STS-B, and the head
    would spend its training on the way. Labels centred within a deviation are left as they are.
    """
    mean = sum(labels) / len(labels)
    deviation = (sum((v - mean) ** 2 for v in labels) / len(labels)) ** 0.5
    if abs(mean) <= deviation:
        return
    named = cast(Iterable[tuple[str, nn.Module]], model.named_modules())
    for name, module in named:
        last = isinstance(module, nn.Linear) and module.out_features == 1
        if last and ".modules_to_save." in name and isinstance(module.bias, Tensor):
            nn.init.constant_(module.bias, mean)
