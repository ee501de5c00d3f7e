"""The training: the Transformers Trainer over passes that are planned beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from orthomerge.errors import OrthomergeError
from orthomerge.models.loading import preferred_device, quiet
from orthomerge.training.distillation.batches import Pass
from orthomerge.training.distillation.settings import DistillSettings
from orthomerge.training.distillation.student import Student


class _Passes(Dataset[dict[str, Pass]]):
    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = passes

    def __len__(self) -> int:
        return len(self._passes)

    def __getitem__(self, place: int) -> dict[str, Pass]:
        return {"work": self._passes[place]}


class _Trainer(Trainer):
    """Passes come in their order, each process has its own already."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        passes: Any = self.train_dataset  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return DataLoader(passes, batch_size=1, shuffle=False, collate_fn=_first)


def _first(items: list[Any]) -> Any:
    return items[0]


class _Watch(TrainerCallback):
    """Tells the progress and measures now and then; ends a training that gains no more."""

    def __init__(self, measure: Callable[[int], bool], every: int) -> None:
        self._measure, self._every = measure, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps
        if state.global_step % self._every == 0 or last:
            control.should_training_stop = self._measure(state.global_step) or last


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(state.global_step, state.max_steps)


def train_student(
    student: Student,
    passes: Sequence[Sequence[Pass]],
    settings: DistillSettings,
    folder: Path,
    *,
    measure: Callable[[int], bool],
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, float]]:
    """Train the factors over the steps' passes; the losses of every tenth step.

    `measure` is told the steps done, and says whether to end. Checkpoints of the factors lie in
    `folder`, where a training that was stopped goes on.

    Raises:
        OrthomergeError: a loss that is not finite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(passes[0]),
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        logging_steps=10,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
        dataloader_pin_memory=False,
        use_cpu=preferred_device().type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    callbacks: list[TrainerCallback] = [_Watch(measure, settings.every)]
    if progress is not None:
        callbacks.append(_Progress(progress))
    with quiet():
        trainer = _Trainer(
            model=student,
            args=arguments,
            train_dataset=_Passes([p for step in passes for p in step]),
            callbacks=callbacks,
        )
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        mean = trainer.train().training_loss
    if not math.isfinite(mean):
        raise OrthomergeError(
            "the distillation gave a loss that is not finite: lower the learning rate "
            f"({settings.learning_rate:g})."
        )
    return [(int(e["step"]), float(e["loss"])) for e in trainer.state.log_history if "loss" in e]
