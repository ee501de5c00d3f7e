"""`orthomerge train` and `orthomerge eval`: one task on files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json

TaskName = Annotated[
    str, typer.Option(help="A task of 'orthomerge tasks', or a CSV, JSONL or Parquet file.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Rows = Annotated[int, typer.Option(min=1)]


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
            help="init (A trains), freeze (A is held) or project; default project where the start "
            "was made for it, else init."
        ),
    ] = None,
    rows: Rows = 400,
    epochs: Annotated[float, typer.Option(min=0.01)] = 3,
    learning_rate: Annotated[float, typer.Option(min=1e-9)] = 2e-3,
    batch_size: Rows = 16,
    max_length: Rows = 48,
    seed: Annotated[int, typer.Option()] = 0,
    json: Json = False,
) -> None:
    """Train an adapter from its start on one task; the head is kept beside it.

    Example: [bold]orthomerge train start/ --task sentiment --output mine/[/]
    """
    from rich.progress import Progress

    from orthomerge.adapters import CONSTRAINTS, KEPT_OUT, read_adapter
    from orthomerge.assets import resolve_model
    from orthomerge.cli._app import err
    from orthomerge.errors import AdapterError, RecipeError, unknown_name
    from orthomerge.models import load_classifier, load_tokenizer
    from orthomerge.tasks import get_task
    from orthomerge.training import TrainingSettings, train_adapter

    if constraint is None:
        constraint = "project" if (start / KEPT_OUT).is_file() else "init"
    if constraint not in CONSTRAINTS:
        raise unknown_name("constraint", constraint, CONSTRAINTS, error=RecipeError)
    about = get_task(task)
    adapter = read_adapter(start)
    found = resolve_model(base or adapter.base_model or "")
    regression = about.kind == "regression"
    labels = 1 if regression else len(about.labels)
    for name, tensor in adapter.modules.items():
        if name.endswith(".weight") and tensor.shape[0] != labels and "dense" not in name:
            raise AdapterError(
                f"the head of '{start}' has {tensor.shape[0]} outputs, task '{about.name}' needs "
                f"{labels}: make the start with --labels {labels}."
            )
    data = about.data(train=rows, seed=seed)
    tokenizer = load_tokenizer(found.path_or_id)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(f"training {about.name}", total=None)
        train_adapter(
            load_classifier(
                found.path_or_id, num_labels=labels, regression=regression, name=found.name
            ),
            start,
            data.train,
            tokenizer,
            regression=regression,
            settings=TrainingSettings(
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                max_length=max_length,
            ),
            constraint=constraint,
            seed=seed,
            output=output,
            record={"task": about.name, "rows": rows, "seed": seed, "data": data.fingerprint},
            progress=lambda done, of: progress.update(bar, completed=done, total=of),
        )
    if json:
        print_json(
            {"path": str(output), "task": about.name, "rows": rows, "constraint": constraint}
        )
        return
    said = {"freeze": ", A held", "project": ", A kept out of the others' directions"}
    out.print(
        f"{output}: trained on {rows} rows of {about.name}{said.get(constraint, '')}.",
        soft_wrap=True,
    )


@app.command(name="eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, merged or not.")],
    task: TaskName,
    head: Annotated[
        Path | None,
        typer.Option(help="Adapter folder or file with the task's head; default the adapter's."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default the adapter's.")] = None,
    rows: Rows = 300,
    max_length: Rows = 48,
    seed: Annotated[int, typer.Option(help="Seed of the rows.")] = 0,
    json: Json = False,
) -> None:
    """Score an adapter on a task's test rows, with the task's own head.

    Example: [bold]orthomerge eval merged/ --task sentiment[/]
    """
    import numpy as np

    from orthomerge.adapters import HEADS, read_adapter, read_head
    from orthomerge.assets import resolve_model
    from orthomerge.evaluation import Evaluator, score
    from orthomerge.files import slug
    from orthomerge.models import load_tokenizer
    from orthomerge.tasks import get_task, majority

    about = get_task(task)
    read = read_adapter(adapter)
    kept = adapter / HEADS / f"{slug(about.name)}.safetensors"
    weights = read_head(head) if head else read_head(kept) if kept.is_file() else read.modules
    found = resolve_model(base or read.base_model or "")
    regression = about.kind == "regression"
    labels = 1 if regression else len(about.labels)
    data = about.data(test=rows, seed=seed)
    evaluator = Evaluator(found.path_or_id, load_tokenizer(found.path_or_id), max_length=max_length)
    predictions = evaluator.predict(
        data.test, read.layers, weights, num_labels=labels, regression=regression
    )
    truth = [r.label for r in data.test]
    scores = score(about.kind, predictions, truth, labels)
    constant = score(about.kind, np.full(rows, majority(data.test, about.kind)), truth, labels)
    if json:
        print_json({"task": about.name, "n": rows, "metrics": scores, "majority": constant})
        return
    for name, value in scores.items():
        mark = " (main)" if name == about.metric else ""
        out.print(f"{name:>18}  {value:.4f}   a constant answer {constant[name]:.4f}{mark}")
