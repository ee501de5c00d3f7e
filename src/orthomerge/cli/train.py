"""`orthomerge train` and `orthomerge eval`: one task on files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._form import Form, TemplateText, prompt_for
from orthomerge.cli._harness import by_harness
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.errors import RecipeError

TaskName = Annotated[
    str, typer.Option(help="A task of 'orthomerge tasks', or a CSV, JSONL or Parquet file.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Rows = Annotated[int, typer.Option(min=1)]
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
            help="init (A trains), freeze (A is held) or project; default project where the start "
            "was made for it, else init."
        ),
    ] = None,
    rows: AtMost = 400,
    epochs: Annotated[float, typer.Option(min=0.01)] = 3,
    learning_rate: Annotated[float, typer.Option(min=1e-9)] = 2e-3,
    batch_size: Rows = 16,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text; default 48, of a prompt 128.")
    ] = None,
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
    from orthomerge.adapters import CONSTRAINTS, KEPT_OUT, read_adapter, require_form
    from orthomerge.assets import resolve_model
    from orthomerge.cli._app import split_names
    from orthomerge.cli._job import several_processes
    from orthomerge.errors import AdapterError, unknown_name
    from orthomerge.models import load_classifier, load_language_model, load_tokenizer
    from orthomerge.tasks import get_task
    from orthomerge.tracking import check_trackers
    from orthomerge.training import TrainingSettings, train_adapter

    trackers = check_trackers(split_names(report_to or ""))
    if constraint is None:
        constraint = "project" if (start / KEPT_OUT).is_file() else "init"
    if constraint not in CONSTRAINTS:
        raise unknown_name("constraint", constraint, CONSTRAINTS, error=RecipeError)
    about = get_task(task)
    prompt = prompt_for(about, form, template)
    adapter = read_adapter(start)
    require_form(adapter, form)
    found = resolve_model(base or adapter.base_model or "")
    regression = about.kind == "regression"
    labels = 1 if regression else len(about.labels)
    for name, tensor in adapter.modules.items():
        if name.endswith(".weight") and tensor.shape[0] != labels and "dense" not in name:
            raise AdapterError(
                f"the head of '{start}' has {tensor.shape[0]} outputs, task '{about.name}' needs "
                f"{labels}: make the start with --labels {labels}."
            )
    data = about.data(train=rows, seed=seed, at_most=True)
    rows = len(data.train)
    tokenizer = load_tokenizer(found.path_or_id)
    with several_processes(), work_bar(f"training {about.name}") as progress:
        model = (
            load_language_model(found.path_or_id, name=found.name)
            if prompt
            else load_classifier(
                found.path_or_id, num_labels=labels, regression=regression, name=found.name
            )
        )
        train_adapter(
            model,
            start,
            data.train,
            tokenizer,
            regression=regression,
            settings=TrainingSettings(
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                max_length=max_length or (128 if prompt else 48),
            ),
            prompt=prompt,
            constraint=constraint,
            seed=seed,
            output=output,
            record={"task": about.name, "rows": rows, "seed": seed, "data": data.fingerprint},
            progress=progress,
            report_to=trackers,
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
    task: Annotated[
        str | None,
        typer.Option(help="A task of 'orthomerge tasks', or a CSV, JSONL or Parquet file."),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            help="Instead of --task: tasks of lm-evaluation-harness with commas between them, or "
            "YAML files and folders of them ('orthomerge tasks --export-harness')."
        ),
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option(help="Adapter folder or file with the task's head; default the adapter's."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default the adapter's.")] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="At most so many test rows; default 300, and of the harness's tasks all."
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text; default 48, of a prompt 128.")
    ] = None,
    form: Form = "classifier",
    template: TemplateText = None,
    scoring: Annotated[
        str,
        typer.Option(help="text: likelihood of the answers, or generation; numbers: generation."),
    ] = "likelihood",
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="With --harness: examples before each question.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --harness: a JSON file for the whole result."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the rows.")] = 0,
    card: Annotated[
        bool, typer.Option("--card", help="Write the score into the merge's model card as well.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score an adapter on a task's test rows, with the task's own head.

    Example: [bold]orthomerge eval merged/ --task sentiment[/]

    In words: [bold]orthomerge eval merged/ --task sentiment --form text --scoring generation[/]

    By the harness: [bold]orthomerge eval merged/ --harness arc_easy --output arc.json[/]
    """
    if harness is not None:
        if task or head or template or card or form != "classifier":
            raise RecipeError(
                "--harness asks its own tasks in their own words: leave out --task, --head, "
                "--form, --template and --card."
            )
        by_harness(adapter, harness, base, rows, few_shot, output, seed, as_json=json, quiet=quiet)
        return
    if task is None:
        raise RecipeError("there is nothing to score: name a task with --task, or --harness.")
    if output is not None or few_shot is not None:
        raise RecipeError("--output and --few-shot go with --harness.")
    rows = rows or 300
    import numpy as np

    from orthomerge.adapters import HEADS, read_adapter, read_head
    from orthomerge.assets import resolve_model
    from orthomerge.evaluation import Evaluator, score
    from orthomerge.files import slug
    from orthomerge.models import load_language_model, load_tokenizer
    from orthomerge.tasks import get_task, majority
    from orthomerge.text_evaluation import TextEvaluator

    about = get_task(task)
    prompt = prompt_for(about, form, template)
    read = read_adapter(adapter)
    kept = adapter / HEADS / f"{slug(about.name)}.safetensors"
    weights = read_head(head) if head else read_head(kept) if kept.is_file() else read.modules
    found = resolve_model(base or read.base_model or "")
    regression = about.kind == "regression"
    labels = 1 if regression else len(about.labels)
    data = about.data(test=rows, seed=seed, at_most=True)
    rows = len(data.test)
    truth, tokenizer = [r.label for r in data.test], load_tokenizer(found.path_or_id)
    if prompt:
        judge = TextEvaluator(
            load_language_model(found.path_or_id), tokenizer, max_length=max_length or 128
        )
        with work_bar(f"evaluating {about.name}") as progress:
            answers = judge.predict(
                data.test, prompt, read.layers, scoring=scoring, progress=progress
            )
        scores = answers.metrics(about.kind, truth, labels)
    else:
        evaluator = Evaluator(found.path_or_id, tokenizer, max_length=max_length or 48)
        with work_bar(f"evaluating {about.name}") as progress:
            predictions = evaluator.predict(
                data.test, read.layers, weights, num_labels=labels, regression=regression,
                progress=progress,
            )  # fmt: skip
        scores = score(about.kind, predictions, truth, labels)
    constant = score(about.kind, np.full(rows, majority(data.test, about.kind)), truth, labels)
    said = {
        "task": about.name, "n": rows, "metric": about.metric, "metrics": scores,
        "majority": constant,
    }  # fmt: skip
    if card:
        from orthomerge.adapters import add_figures, figure_of

        add_figures(adapter, [figure_of(said)])
    if json:
        print_json(said)
        return
    for name, value in scores.items():
        mark = " (main)" if name == about.metric else ""
        out.print(f"{name:>18}  {value:.4f}   {_beside(constant, name)}{mark}")


def _beside(constant: dict[str, float], name: str) -> str:
    """What a constant answer scores, where it scores at all."""
    return f"a constant answer {constant[name]:.4f}" if name in constant else ""
