"""The training: the Transformers Trainer over passes that are planned beforehand."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from orthomerge.errors import OrthomergeError
from orthomerge.io.documents import Unreadable, read_json
from orthomerge.io.files import write_json
from orthomerge.models.loading import preferred_device, quiet
from orthomerge.statistics.distributed import process_rank
from orthomerge.training.distillation.batches import Pass
from orthomerge.training.distillation.measure import Referee
from orthomerge.training.distillation.settings import DistillSettings
from orthomerge.training.distillation.student import Student

_QUESTION, _STATE = "question.json", "trainer_state.json"


class _Passes(Dataset[dict[str, Pass]]):
    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = passes

    def __len__(self) -> int:
        return len(self._passes)

    def __getitem__(self, place: int) -> dict[str, Pass]:
        return {"work": self._passes[place]}


class _Trainer(Trainer):
    """Passes come in their order, and each process has its own already."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        passes: Any = self.train_dataset  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        return DataLoader(passes, batch_size=1, shuffle=False, collate_fn=_first)


def _first(items: list[Any]) -> Any:
    return items[0]


class _Watch(TrainerCallback):
    """Reports the progress and measures now and then; ends a training that gains no more."""

    def __init__(
        self, referee: Referee, every: int, report: Callable[[int, int], None] | None
    ) -> None:
        self._referee, self._every, self._report = referee, every, report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done, of = state.global_step, state.max_steps
        if self._report is not None:
            self._report(done, of)
        if done % self._every == 0 or done == of:
            control.should_training_stop = self._referee.measure(done) or done == of


def train_student(
    student: Student,
    passes: Sequence[Sequence[Pass]],
    settings: DistillSettings,
    folder: Path,
    referee: Referee,
    *,
    resumed: Path | None,
    keeps: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, float]]:
    """Train the factors over the steps' passes; the mean losses of every ten steps.

    With `keeps` checkpoints of the factors lie in `folder`; from `resumed`, one of them, a training
    that was stopped goes on to the very factors that it would have had.

    Raises:
        OrthomergeError: a loss that is not finite.
    """
    arguments = _arguments(settings, folder, len(passes[0]), keeps=keeps)
    with quiet():
        trainer = _Trainer(
            model=student,
            args=arguments,
            train_dataset=_Passes([p for step in passes for p in step]),
            callbacks=[_Watch(referee, settings.every, progress)],
        )
        # The loss of a pass is a mean by itself: the Trainer divides by passes and processes.
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    losses = [(int(e["step"]), float(e["loss"])) for e in trainer.state.log_history if "loss" in e]
    if not all(math.isfinite(loss) for _, loss in losses):
        raise OrthomergeError(
            "the distillation gave a loss that is not finite: lower the learning rate "
            f"({settings.learning_rate:g})."
        )
    return losses


def _arguments(
    settings: DistillSettings, folder: Path, passes: int, *, keeps: bool
) -> TrainingArguments:
    """The settings in the Trainer's words."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=passes,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        warmup_steps=settings.warmup,  # a value below one is a share of all steps
        lr_scheduler_type="linear",
        optim="adamw_torch",
        logging_steps=min(10, settings.steps),
        logging_nan_inf_filter=False,
        save_strategy="steps" if keeps else "no",
        save_steps=settings.every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
        dataloader_pin_memory=False,
        use_cpu=preferred_device().type == "cpu",
    )
    # The base is not a part of the module, so DataParallel could not copy it to another device.
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    return arguments


def checkpoint_of(folder: Path, question: str) -> Path | None:
    """The last whole checkpoint of the same question; what is of another one is cleared away."""
    rank, world = process_rank()
    if rank == 0 and not _same_question(folder, question):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / _QUESTION, {"question": question})
    if world > 1:
        distributed.barrier()
    found = [p for p in folder.glob("checkpoint-*") if (p / _STATE).is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _same_question(folder: Path, question: str) -> bool:
    try:
        said: Any = read_json(folder / _QUESTION)
    except (Unreadable, OSError):
        return False
    return dict(said).get("question") == question


def step_of(checkpoint: Path | None) -> int:
    """The steps that were done at a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
