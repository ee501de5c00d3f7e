"""`orthomerge train` and `orthomerge eval`: one task on files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._form import Form, TemplateText, prompt_for
from orthomerge.cli._options import Count, Json, MaxLength, TaskName, file_paths
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.errors import RecipeError

if TYPE_CHECKING:
    from orthomerge.adapters import Adapter
    from orthomerge.models.assets import ResolvedModel
    from orthomerge.tasks import Prompt, Task

AtMost = Annotated[int, typer.Option(min=1, help="At most so many; a small task gives all it has.")]


@app.command()
def train(
    start: Annotated[Path, typer.Argument(help="An adapter folder, as 'orthomerge init' makes.")],
    task: TaskName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="Base model; default the one the start names.")
    ] = None,
    constraint: Annotated[
        str | None,
        typer.Option(
            help="init (train freely), freeze (A is held), project or penalty; default what the "
            "start was made for."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0, help="penalty: another weight in the loss than the start carries."),
    ] = None,
    rows: AtMost = 400,
    epochs: Annotated[float, typer.Option(min=0.01)] = 3,
    learning_rate: Annotated[float, typer.Option(min=1e-9)] = 2e-3,
    batch_size: Count = 16,
    max_length: MaxLength = None,
    form: Form = "classifier",
    template: TemplateText = None,
    seed: Annotated[int, typer.Option()] = 0,
    report_to: Annotated[
        str | None,
        typer.Option(
            help="Trackers that follow the loss: tensorboard, wandb, mlflow (commas between them); "
            "their files go to logs/ beside the output."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter from its start on one task; the head is kept beside it.

    Under 'accelerate launch' or 'torchrun' several processes share every batch.

    Example: [bold]orthomerge train start/ --task sentiment --output mine/[/]

    In words: [bold]orthomerge train start/ --form text --task sentiment --output mine/[/]
    """
    from orthomerge.adapters import read_adapter, require_form
    from orthomerge.cli._app import split_names
    from orthomerge.cli._processes import several_processes
    from orthomerge.io.names import TRAINING
    from orthomerge.io.outputs import require_apart, require_free
    from orthomerge.models.assets import resolve_model
    from orthomerge.models.loading import load_tokenizer
    from orthomerge.tasks import get_task
    from orthomerge.training import TrainingSettings, train_adapter
    from orthomerge.training.tracking import check_trackers

    require_free(output, inputs=[start, *file_paths([task])], base=base, kind=TRAINING)
    trackers = check_trackers(split_names(report_to or ""))
    constraint = _constraint(start, constraint, strength)
    about = get_task(task)
    prompt = prompt_for(about, form, template)
    adapter = read_adapter(start)
    require_form(adapter, form)
    require_apart(output, base=base or adapter.base_model)
    found = resolve_model(
        base or adapter.base_model or "", revision=None if base else adapter.revision
    )
    _check_head(start, adapter, about)
    data = about.data(train=rows, seed=seed, at_most=True)
    tokenizer, rows = load_tokenizer(found.path_or_id), len(data.train)
    settings = TrainingSettings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        max_length=max_length or (128 if prompt else 48),
    )  # fmt: skip
    with several_processes(), work_bar(f"training {about.name}") as progress:
        train_adapter(
            _model(found, about, prompt), start, data.train, tokenizer,
            regression=about.regression, settings=settings, prompt=prompt,
            constraint=constraint, strength=strength, seed=seed, output=output,
            record={"task": about.name, "rows": rows, "seed": seed, "data": data.fingerprint},
            progress=progress, report_to=trackers,
        )  # fmt: skip
    if json:
        about_it = {"task": about.name, "rows": rows, "constraint": constraint}
        print_json({"path": str(output), **about_it})
        return
    said = {
        "freeze": ", A held",
        "project": ", A kept out of the others' directions",
        "penalty": ", charged for what it does to the others' outputs",
    }
    text = f"{output}: trained on {rows} rows of {about.name}{said.get(constraint, '')}."
    out.print(text, soft_wrap=True)


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
