"""One adapter trained on one task: the model made ready, the Trainer run, the adapter written."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, distributed, nn
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from orthomerge.adapters import (
    CONSTRAINTS,
    FROZEN_B,
    Charges,
    OsrmConfig,
    Penalty,
    Projection,
    freeze_A,
    freeze_B,
    load_trainable,
    penalty_charges,
    read_excluded,
    read_penalty,
)
from orthomerge.errors import OrthomergeError, unknown_name
from orthomerge.io.files import atomic_path, file_sha256, fingerprint, write_text
from orthomerge.io.names import CARD, TRAINING
from orthomerge.io.outputs import require_free
from orthomerge.models.loading import agree_on_padding, encode, quiet
from orthomerge.models.modules import set_dropout
from orthomerge.prompting import IGNORED, Wording
from orthomerge.records import seal, trained_card
from orthomerge.statistics import Statistics
from orthomerge.tasks import Prompt, Row
from orthomerge.training.answers import AnswerTrainer
from orthomerge.training.callbacks import (
    PenaltyCallback,
    ProjectionCallback,
    require_whole,
    trained_under,
)
from orthomerge.training.checkpoints import Checkpoints
from orthomerge.training.settings import TrainingSettings, planned_steps, trainer_arguments
from orthomerge.training.tracking import following


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(state.global_step, state.max_steps)


class Charged(NamedTuple):
    """What a penalty is made of where the start does not carry it: see `penalty_charges`."""

    others: Sequence[Statistics | str | Path]
    own: Statistics | str | Path | None
    config: OsrmConfig


def train_adapter(
    model: Any,
    start: str | Path,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    regression: bool,
    settings: TrainingSettings,
    constraint: str = "init",
    charged: Charged | None = None,
    strength: float | None = None,
    fresh_head: bool = True,
    seed: int = 0,
    output: str | Path,
    prompt: Prompt | None = None,
    record: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    report_to: Sequence[str] = (),
    logs: str | Path | None = None,
    label: str | None = None,
    checkpoints: str | Path | None = None,
    stop: Callable[[], bool] | None = None,
    overwrite: bool = False,
) -> Path:
    """Train the adapter in `start` on `rows` and write it to `output`, its head with it.

    `model` is the base with the task's head; it is changed in place. With a `prompt` it is a
    language model, a decoder or an encoder-decoder, and learns to answer the prompt in words; loss
    is taken of the answer alone. `constraint="freeze"` holds A where the start put it, "project"
    keeps it out of the directions that the start carries, "penalty" charges the update for what
    it does to the others' outputs (`charged`, or what the start carries, at another `strength` if
    one is given), "freeze_B" holds B instead. A head that
    was trained before is no `fresh_head`. In a job of several processes each takes its share of
    every batch, and the first one writes. The order of the rows is drawn under `seed`; batches are
    grouped by length. `record` is kept beside the weights as `training.json`, together with the
    constraint and the losses. `report_to` names what else follows the losses, "tensorboard",
    "wandb" or "mlflow", as the Trainer's option does; their files go into the folder `logs`, by
    default beside `output`, and call the training `label`, by default the output's name.

    With a folder for `checkpoints` a training that was cut off goes on there, with the same result,
    when it is called again; the folder is removed when the adapter is written. `stop` is asked
    after each step whether to end there: a checkpoint is kept and `TrainingStopped` raised. With
    `overwrite` checkpoints of another training are removed.

    Raises:
        UnknownNameError: no such constraint.
        TrainingError: `checkpoints` holds those of another training.
        OrthomergeError: the loss is not finite (the learning rate is too high), or the batch cannot
            be shared among the processes.
        AdapterError: the constraint "project" and a start that carries no directions, "penalty"
            and one that carries no statistics, or "freeze_B" and one whose B is zero.
        OutputError: an output that overlaps with the start, or that holds what orthomerge did not
            write.
    """
    if constraint not in (*CONSTRAINTS, FROZEN_B):
        raise unknown_name("constraint", constraint, [*CONSTRAINTS, FROZEN_B])
    require_free(output, inputs=[start], overwrite=True)
    label = label or Path(output).name
    followed = following(report_to, Path(logs or Path(output).parent / "logs"), label)
    if settings.base_dropout is not None:
        set_dropout(model, settings.base_dropout)
    peft_model = load_trainable(agree_on_padding(model, tokenizer), start)
    # Checkpoints too: for "auto" PEFT asks the hub for the base's configuration at each of them.
    saves = partial(peft_model.save_pretrained, save_embedding_layers=False)
    cast(Any, peft_model).save_pretrained = saves
    charges = None
    if constraint == "penalty":
        charges = (
            penalty_charges(peft_model, *charged) if charged else read_penalty(start, strength)
        )
    trained = trained_under(constraint, charges)
    callbacks = _held(peft_model, start, constraint, charges)
    priced = next((c for c in callbacks if isinstance(c, PenaltyCallback)), None)
    callbacks += [_Progress(progress)] if progress else []
    if settings.precision == "bf16":
        for name, parameter in peft_model.named_parameters():
            # What is or was trained would not feel small steps in bfloat16; the base feels none.
            own = parameter.requires_grad or ".lora_" in name or ".modules_to_save." in name
            parameter.data = parameter.data.float() if own else parameter.data.bfloat16()
    if regression and fresh_head and prompt is None:
        _start_at_the_mean(peft_model, [float(r.label) for r in rows])
    encoded, collate = _examples(rows, tokenizer, model.config, settings, prompt, regression)
    rank, world = _process()
    kept = None
    if checkpoints is not None:
        # All that the result depends on, but for the versions of what computes it.
        key = _key(start, rows, model, settings, trained, charged, seed, prompt)
        kept = Checkpoints(Path(checkpoints), key, stop=stop, replace=overwrite)
        callbacks.append(kept)
    with _scratch(kept) as scratch, quiet(), followed as trackers:
        kind = AnswerTrainer if prompt is not None and AnswerTrainer.fits(model) else Trainer
        trainer = kind(
            model=peft_model,
            args=trainer_arguments(
                settings,
                scratch,
                steps=planned_steps(settings, len(rows)),
                world=world,
                seed=seed,
                trackers=trackers,
                label=label,
            ),
            train_dataset=encoded,  # pyright: ignore[reportArgumentType]  (a list is a dataset)
            data_collator=collate,
            callbacks=callbacks,
        )
        if priced is not None:  # before the trackers, so that they have the penalty's value
            trainer.pop_callback(priced)
            trainer.callback_handler.callbacks.insert(0, priced)
        # What takes a mean loss by itself, the Trainer would not divide by passes and processes.
        trainer.model_accepts_loss_kwargs = _sums_its_loss(model, prompt)
        whole = _run(trainer, start, constraint, kept.last() if kept else None)
    if kept:
        kept.require_done()
    said = {
        **(record or {}),
        **trained,
        **_asked(prompt, settings, regression=regression),
        "losses": _history(trainer, "loss"),
        "constant_loss": constant_loss(rows, encoded, prompt, regression=regression),
        **({"penalties": _history(trainer, "penalty")} if constraint == "penalty" else {}),
    }
    peft_model.peft_config["default"].inference_mode = True
    if rank == 0:  # every process holds the same weights, or the first one the whole
        with atomic_path(output) as folder:
            peft_model.save_pretrained(str(folder), state_dict=whole)
            config = peft_model.peft_config["default"]
            card = trained_card(said, config.base_model_name_or_path, config.task_type)
            write_text(folder / CARD, card)
            seal(folder, TRAINING, said)
        if kept:
            kept.clear()
    if world > 1:
        distributed.barrier()
    return Path(output)


def _key(
    start: str | Path,
    rows: Sequence[Row],
    model: Any,
    settings: TrainingSettings,
    trained: Mapping[str, Any],
    charged: Charged | None,
    seed: int,
    prompt: Prompt | None,
) -> str:
    """The hash of what a training depends on."""
    files = sorted(p for p in Path(start).iterdir() if p.is_file())
    return fingerprint(
        {
            "start": {p.name: file_sha256(p) for p in files},
            "rows": [list(row) for row in rows],
            "base": model.name_or_path,
            "settings": asdict(settings), **trained, "seed": seed,
            "charged": None if charged is None else [*map(_named, charged)],
            "prompt": prompt.fingerprint if prompt else None,
        }
    )  # fmt: skip


def _named(given: Any) -> Any:
    """Statistics by what they say of themselves or by their files; anything else as it is shown."""
    if isinstance(given, list | tuple):
        return [_named(item) for item in cast(Sequence[Any], given)]
    if isinstance(given, str | Path):
        return file_sha256(given)
    return repr(given.meta if isinstance(given, Statistics) else given)


@contextmanager
def _scratch(kept: Checkpoints | None) -> Generator[str, None, None]:
    """Where the Trainer writes: with the checkpoints, or nowhere that stays."""
    if kept is not None:
        yield str(kept.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield scratch


def _asked(
    prompt: Prompt | None, settings: TrainingSettings, *, regression: bool
) -> dict[str, Any]:
    """How the adapter is asked what it learnt, for the record."""
    form = {"form": "text", "prompt": prompt.record()} if prompt else {"form": "classifier"}
    return {**form, "regression": regression, "max_length": settings.max_length}


def _history(trainer: Trainer, name: str) -> list[tuple[int, float]]:
    """Pairs of a step and a value that the Trainer logged."""
    return [(int(e["step"]), e[name]) for e in trainer.state.log_history if name in e]


def constant_loss(
    rows: Sequence[Row],
    encoded: Sequence[Mapping[str, Any]],
    prompt: Prompt | None,
    *,
    regression: bool,
) -> float:
    """The loss of the best answer that looks at no text: compare the end of a training with it.

    Of classes it is the entropy of the labels in nats, of values their variance, of answers in
    words the entropy of the answers over the mean number of their tokens.
    """
    if regression and prompt is None:
        values = [float(row.label) for row in rows]
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values) / len(values)
    answers = Counter(row.label if prompt is None else prompt.answer(row.label) for row in rows)
    shares = [count / len(rows) for count in answers.values()]
    entropy = -sum(share * math.log(share) for share in shares)
    if prompt is None:
        return entropy
    tokens = sum(label != IGNORED for example in encoded for label in example["labels"])
    return entropy * len(rows) / tokens


def _held(
    peft_model: Any, start: str | Path, constraint: str, charges: Charges | None
) -> list[TrainerCallback]:
    """Put the constraint on the model; what it needs at every step."""
    if constraint == "freeze":
        freeze_A(peft_model)
    elif constraint == FROZEN_B:
        freeze_B(peft_model)
    elif constraint == "project":
        return [ProjectionCallback(Projection(peft_model, read_excluded(start)))]
    elif charges is not None:
        return [PenaltyCallback(Penalty(peft_model, charges))]
    return []


def _examples(
    rows: Sequence[Row],
    tokenizer: Any,
    config: Any,
    settings: TrainingSettings,
    prompt: Prompt | None,
    regression: bool,
) -> tuple[list[dict[str, Any]], Any]:
    """Rows as the model reads them, and what makes a batch of them."""
    if prompt is not None:
        wording = Wording.of(prompt, tokenizer, config, settings.max_length)
        return wording.examples(rows), wording.collate
    encoded = encode(tokenizer, [(r.text, r.pair) for r in rows], settings.max_length)
    for features, row in zip(encoded, rows, strict=True):
        features["labels"] = float(row.label) if regression else int(row.label)
    return encoded, DataCollatorWithPadding(tokenizer)


def _run(
    trainer: Trainer, start: str | Path, constraint: str, checkpoint: str | None
) -> dict[str, Tensor] | None:
    """Train; the whole weights where each process holds only a part of them, else None.

    Raises:
        OrthomergeError: cut weights under a constraint that looks at A and B, or a loss that is not
            finite.
    """
    trainer.remove_callback(PrinterCallback)
    if constraint in ("project", "penalty") and _cuts(trainer):
        require_whole(constraint)
    mean_loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
    # Where weights are cut, all processes have to give their parts before one can write.
    accelerator: Any = trainer.accelerator
    whole = accelerator.get_state_dict(trainer.model) if _cuts(trainer) else None
    if not math.isfinite(mean_loss):
        raise OrthomergeError(
            f"training from '{start}' gave a loss that is not finite: lower the learning rate "
            f"({trainer.args.learning_rate:g})."
        )
    return whole


def _cuts(trainer: Trainer) -> bool:
    """Whether each process holds only a part of the weights."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _sums_its_loss(model: Any, prompt: Prompt | None) -> bool:
    """Whether the model divides its loss by the items of the whole batch: decoders alone do."""
    return prompt is not None and not getattr(model.config, "is_encoder_decoder", False)


def _process() -> tuple[int, int]:
    """This process's number in a job of several, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


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
