"""`orthomerge eval`: the scores of one task on files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._form import Form, TemplateText, prompt_for
from orthomerge.cli._harness import by_harness
from orthomerge.cli._options import Json, MaxLength
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.adapters import Adapter
    from orthomerge.models.assets import ResolvedModel
    from orthomerge.tasks import Prompt, Row, Task


@app.command(name="eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, merged or not.")],
    task: Annotated[
        str | None,
        typer.Option(help="A task of 'orthomerge list tasks', or a CSV, JSONL or Parquet file."),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            help="Instead of --task: tasks of lm-evaluation-harness with commas between them, or "
            "YAML files and folders of them ('orthomerge list tasks --export-harness')."
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
    max_length: MaxLength = None,
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
    from orthomerge.tasks import get_task

    about = get_task(task)
    prompt = prompt_for(about, form, template)
    how = _Scoring(prompt, scoring, max_length or (128 if prompt else 48))
    said = _scored(adapter, about, how, head, base, rows or 300, seed)
    if card:
        from orthomerge.records import add_scores, score_of

        add_scores(adapter, [score_of(said)])
    if json:
        print_json(said)
        return
    for name, value in said["metrics"].items():
        mark = " (main)" if name == about.metric else ""
        out.print(f"{name:>18}  {value:.4f}   {_beside(said['majority'], name)}{mark}")


class _Scoring(NamedTuple):
    """How a task is asked and its answers are scored."""

    prompt: Prompt | None
    scoring: str
    max_length: int


def _scored(
    folder: Path,
    about: Task,
    how: _Scoring,
    head: Path | None,
    base: str | None,
    rows: int,
    seed: int,
) -> dict[str, Any]:
    """Every metric on at most `rows` test rows, beside what a constant answer scores."""
    import numpy as np

    from orthomerge.adapters import read_adapter
    from orthomerge.evaluation.classification import score
    from orthomerge.models.assets import resolve_model
    from orthomerge.tasks import majority

    adapter = read_adapter(folder)
    weights = _head(folder, adapter, head, about)
    found = resolve_model(
        base or adapter.base_model or "", revision=None if base else adapter.revision
    )
    test = about.data(test=rows, seed=seed, at_most=True).test
    truth = [row.label for row in test]
    if how.prompt:
        scores = _by_words(found, adapter, about, how, test)
    else:
        predictions = _predictions(found, adapter, about, how, weights, test)
        scores = score(about.kind, predictions, truth, about.outputs)
    constant = np.full(len(test), majority(test, about.kind))
    return {
        "task": about.name, "n": len(test), "metric": about.metric, "metrics": scores,
        "majority": score(about.kind, constant, truth, about.outputs),
    }  # fmt: skip


def _head(folder: Path, adapter: Adapter, named: Path | None, about: Task) -> Mapping[str, Tensor]:
    """The head that was named, else the task's own beside a merge, else the adapter's."""
    from orthomerge.adapters import read_head
    from orthomerge.io.files import slug
    from orthomerge.io.names import HEAD, HEADS

    if named:
        return read_head(named)
    kept = folder / HEADS / f"{slug(about.name)}{HEAD}"
    return read_head(kept) if kept.is_file() else adapter.modules


def _by_words(
    found: ResolvedModel, adapter: Adapter, about: Task, how: _Scoring, test: Sequence[Row]
) -> dict[str, float]:
    """The metrics of a language model's answers."""
    from orthomerge.evaluation.text import TextEvaluator
    from orthomerge.models.loading import load_language_model, load_tokenizer

    assert how.prompt is not None
    tokenizer = load_tokenizer(found.path_or_id)
    judge = TextEvaluator(
        load_language_model(found.path_or_id), tokenizer, max_length=how.max_length
    )
    with work_bar(f"evaluating {about.name}") as progress:
        answers = judge.predict(
            test, how.prompt, adapter.layers, scoring=how.scoring, progress=progress
        )
    return answers.metrics(about.kind, [row.label for row in test], about.outputs)


def _predictions(
    found: ResolvedModel,
    adapter: Adapter,
    about: Task,
    how: _Scoring,
    weights: Mapping[str, Tensor],
    test: Sequence[Row],
) -> Any:
    """What the base with the adapter and a head predicts."""
    from orthomerge.evaluation.classification import Evaluator
    from orthomerge.models.loading import load_tokenizer

    evaluator = Evaluator(
        found.path_or_id, load_tokenizer(found.path_or_id), max_length=how.max_length
    )
    with work_bar(f"evaluating {about.name}") as progress:
        return evaluator.predict(
            test, adapter.layers, weights, num_labels=about.outputs,
            regression=about.regression, progress=progress,
        )  # fmt: skip


def _beside(constant: dict[str, float], name: str) -> str:
    """What a constant answer scores, where it scores at all."""
    return f"a constant answer {constant[name]:.4f}" if name in constant else ""
