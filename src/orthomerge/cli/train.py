"""`orthomerge train`: one task on files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, err, out, print_json, stopping_between
from orthomerge.cli._form import Asked, Chat, Form, TemplateText, asked, form_of
from orthomerge.cli._options import (
    Count,
    CountOrNone,
    Json,
    MaxLength,
    Output,
    Overwrite,
    Precision,
    Rate,
    file_paths,
)
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.cli._rows import Rows, TrainFile, check_files, training_rows
from orthomerge.errors import RecipeError

if TYPE_CHECKING:
    from orthomerge.adapters import Adapter
    from orthomerge.models.assets import ResolvedModel
    from orthomerge.tasks import Prompt, Task


@app.command()
def train(
    start: Path,
    output: Output,
    task: str | None = None,
    train_file: TrainFile = None,
    base: str | None = None,
    constraint: str | None = None,
    strength: Annotated[float | None, typer.Option(min=0)] = None,
    rows: CountOrNone = None,
    epochs: Annotated[float, typer.Option(min=0.01)] = 3,
    learning_rate: Rate = 2e-3,
    batch_size: Count = 16,
    max_length: MaxLength = None,
    precision: Precision = "float32",
    base_dropout: Annotated[float | None, typer.Option(min=0, max=0.99)] = None,
    form: Form = None,
    template: TemplateText = None,
    chat: Chat = False,
    seed: Annotated[int, typer.Option()] = 0,
    report_to: str | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter from its start on one task; a classifier's head is kept beside it.

    A training that is stopped (Ctrl-C, a scheduler's SIGTERM, a power cut) goes on where it was
    when the same command is called again; its checkpoints are in OUTPUT.checkpoints until then.

    Under 'accelerate launch' or 'torchrun' several processes share every batch.

    Example: [bold]orthomerge train start/ --train-file mine.jsonl --output mine/[/]

    Example: [bold]orthomerge train start/ --task sentiment --output mine/[/]

    Args:
        start: An adapter folder, as 'orthomerge init' makes.
        output: The adapter folder to write.
        task: A task of 'orthomerge list tasks', or a CSV, JSONL or Parquet file, 30 % of whose rows
            are kept for 'orthomerge eval --task'.
        base: Base model; default the one the start names.
        constraint: init (train freely), freeze (A is held), project or penalty; default what the
            start was made for.
        strength: penalty: another weight in the loss than the start carries.
        base_dropout: The dropout of the base's own layers; default what its configuration says, and
            0 lets the penalty act most.
        rows: At most so many; default 400 of a task, all of --train-file.
        report_to: Trackers that follow the loss: tensorboard, wandb, mlflow (commas between them);
            their files go to logs/ beside the output.
    """
    from orthomerge.io.outputs import require_apart, require_free

    check_files(task, train_file)
    tables = file_paths(str(item) for item in (task, train_file) if item)
    require_free(output, inputs=[start, *tables], base=base, overwrite=overwrite)

    from orthomerge.adapters import base_of, read_adapter, require_form
    from orthomerge.cli._app import split_names
    from orthomerge.cli._processes import several_processes
    from orthomerge.models.loading import check_precision, load_tokenizer
    from orthomerge.training import TrainingSettings, train_adapter
    from orthomerge.training.tracking import check_trackers

    trackers = check_trackers(split_names(report_to or ""))
    constraint = _constraint(start, constraint, strength)
    adapter = read_adapter(start)
    kind = form_of(form, adapter.config.get("task_type"), words=template is not None or chat)
    require_form(adapter, kind)
    require_apart(output, base=base or adapter.base_model)
    found, said = training_rows(task, train_file, rows, seed)
    about = found.task
    how = asked(about, kind, template, chat=chat, max_length=max_length)
    _compare(start, how)
    model = base_of(adapter, base)
    _check_head(start, adapter, about)
    settings = TrainingSettings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        max_length=how.max_length, precision=check_precision(precision), base_dropout=base_dropout,
    )  # fmt: skip
    with (
        several_processes() as process,
        stopping_between(process.world == 1) as stop,
        work_bar(f"training {about.name}") as progress,
    ):
        train_adapter(
            _model(model, about, how.prompt), start, found.rows, load_tokenizer(model.path_or_id),
            regression=about.regression, settings=settings, prompt=how.prompt,
            constraint=constraint, strength=strength, seed=seed, output=output,
            record={
                "task": about.name, "rows": len(found.rows), "seed": seed,
                "data": found.fingerprint, **said,
            },
            progress=progress, report_to=trackers, stop=stop, overwrite=overwrite,
            checkpoints=output.with_name(f"{output.name}.checkpoints"),
        )  # fmt: skip
    if process.rank == 0:
        _report(output, found, constraint, learning_rate, as_json=json)


_HOW = {
    "freeze": ", A held",
    "project": ", A projected out of the others' directions",
    "penalty": ", charged for what it does to the others' outputs",
}


def _report(output: Path, found: Rows, constraint: str, rate: float, *, as_json: bool) -> None:
    """What was trained on what, how the loss went, and whether anything was learnt."""
    from orthomerge.io.names import TRAINING
    from orthomerge.records import record_of

    record = record_of(output, TRAINING)
    losses = [value for _, value in record["losses"]]
    constant, (first, last) = record["constant_loss"], (losses[0], losses[-1])
    learnt = last < _NOTHING * constant
    if as_json:
        print_json(
            {"path": str(output), "task": found.task.name, "rows": len(found.rows),
             "of": found.of, "what": found.what, "constraint": constraint,
             "loss": {"first": first, "last": last, "constant": constant}, "learnt": learnt}
        )  # fmt: skip
        return
    out.print(
            f"{output}: trained on {found.said}{_HOW.get(constraint, '')}; loss {first:.2f} → "
            f"{last:.2f} (a constant answer: {constant:.2f}).",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    if not learnt:
        err.print(
            f"[bold yellow]warning:[/] the loss ends at {last:.3f}, no better than a constant "
            f"answer's {constant:.3f}: it has not learnt the task. Try another "
            f"--learning-rate (now {rate:g}), more --epochs, or look at the labels.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


_NOTHING = 0.98
"""From this part of a constant answer's loss on, nothing of the task is taken to be learnt."""


def _constraint(start: Path, named: str | None, strength: float | None) -> str:
    """The constraint that was named, else what the start was made for."""
    from orthomerge.adapters import CONSTRAINTS, constraint_of
    from orthomerge.errors import unknown_name

    if named is not None and named not in CONSTRAINTS:
        raise unknown_name("constraint", named, CONSTRAINTS, error=RecipeError)
    found = named or constraint_of(start)
    if strength is not None and found != "penalty":
        raise RecipeError(
            f"--strength is for the constraint 'penalty', and this training has '{found}': make "
            "the start with --constraint penalty, or leave it out."
        )
    return found


def _compare(start: Path, how: Asked) -> None:
    """Say where the texts are read otherwise than for the statistics that the start is made of."""
    from orthomerge.io.documents import is_object
    from orthomerge.io.names import START
    from orthomerge.records import record_of

    read = record_of(start, START).get("read_as") if (start / START).is_file() else None
    if not is_object(read):
        return
    prompt, length = read.get("prompt"), read.get("max_length")
    other = ["with another prompt"] if how.prompt and prompt != how.prompt.fingerprint else []
    other += [f"at {length} tokens, not {how.max_length}"] if length != how.max_length else []
    if other:
        err.print(
            f"note: the start's statistics were collected {' and '.join(other)}: say the same "
            "--template, --chat and --max-length to every step.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _check_head(start: Path, adapter: Adapter, about: Task) -> None:
    """Refuse a head of other classes than the task's."""
    from orthomerge.errors import AdapterError

    labels = about.outputs
    for name, tensor in adapter.modules.items():
        if name.endswith(".weight") and tensor.shape[0] != labels and "dense" not in name:
            raise AdapterError(
                f"the head of '{start}' has {tensor.shape[0]} outputs, task '{about.name}' needs "
                f"{labels}: make the start with --labels {labels}."
            )


def _model(found: ResolvedModel, about: Task, prompt: Prompt | None) -> Any:
    """The base with the task's head, or as the language model that it is."""
    from orthomerge.models.loading import load_classifier, load_language_model

    if prompt:
        return load_language_model(found.path_or_id, name=found.name)
    return load_classifier(
        found.path_or_id, num_labels=about.outputs, regression=about.regression,
        name=found.name,
    )  # fmt: skip
