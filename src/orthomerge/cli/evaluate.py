"""`orthomerge eval`: the scores of one task on files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._form import Asked, Chat, Form, TemplateText, asked, form_of
from orthomerge.cli._harness import by_harness
from orthomerge.cli._options import CountOrNone, Json, MaxLength, Precision
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.cli._rows import Rows, TestFile, check_files, test_rows
from orthomerge.cli._subject import Subject, find_subject, learnt_in
from orthomerge.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from orthomerge.tasks import Row, Task


@app.command(name="eval")
def evaluate(
    adapter: str,
    task: str | None = None,
    test_file: TestFile = None,
    harness: str | None = None,
    head: Path | None = None,
    base: str | None = None,
    rows: CountOrNone = None,
    max_length: MaxLength = None,
    precision: Precision = "float32",
    form: Form = None,
    template: TemplateText = None,
    chat: Chat = False,
    scoring: str = "likelihood",
    few_shot: Annotated[int | None, typer.Option(min=0)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
    seed: int = 0,
    card: Annotated[bool, typer.Option("--card")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score an adapter or a model on a task's test rows.

    A classifier needs the task's head: the adapter's own, or the one beside a merge. A language
    model is asked with the prompt that its adapter was trained with.

    Example: [bold]orthomerge eval merged/ --task sentiment[/]

    Example: [bold]orthomerge eval mine/ --test-file mine-test.jsonl[/]

    In words: [bold]orthomerge eval merged/ --task sentiment --scoring generation[/]

    By the harness: [bold]orthomerge eval merged/ --harness arc_easy --output arc.json[/]

    Args:
        adapter: An adapter folder, merged or not; or a model: a merge saved as 'full', a base
            model's folder, packaged id or hub id.
        task: A task of 'orthomerge list tasks', or a CSV, JSONL or Parquet file: whole, or its test
            split where the adapter was trained on the rest of it.
        harness: Instead of --task: tasks of lm-evaluation-harness with commas between them, or YAML
            files and folders of them ('orthomerge list tasks --export-harness').
        head: Adapter folder or file with the task's head; default the adapter's.
        base: Base model; default the adapter's.
        rows: At most so many rows; default 300, of --test-file and the harness's tasks all.
        scoring: text: likelihood of the answers, or generation; numbers: generation.
        few_shot: With --harness: examples before each question.
        output: With --harness: a JSON file for the whole result.
        seed: Seed of the rows.
        card: Write the score into the merge's model card as well.
    """
    if harness is not None:
        if task or test_file or head or template or chat or card or form is not None:
            raise RecipeError(
                "--harness asks its own tasks in their own words: leave out --task, --test-file, "
                "--head, --form, --template, --chat and --card."
            )
        by_harness(
            Path(adapter), harness, base, rows, few_shot, output, seed, as_json=json, quiet=quiet
        )
        return
    if task is None and test_file is None:
        raise RecipeError("there is nothing to score: name a --task, a --test-file or a --harness.")
    if output is not None or few_shot is not None:
        raise RecipeError("--output and --few-shot go with --harness.")
    check_files(task, test_file)
    subject = find_subject(adapter, base)
    kind = form_of(form, subject.task_type, words=template is not None or chat)
    subject.require_form(kind)
    found = test_rows(task, test_file, rows, seed, subject.learnt)
    learnt = learnt_in(subject, found)
    how = asked(found.task, kind, template, chat=chat, max_length=max_length, learnt=learnt)
    said = _scored(subject, found, how, scoring, head, precision)
    if card:
        from orthomerge.records import add_scores, score_of

        add_scores(adapter, [score_of(said)])
    if json:
        print_json(said)
        return
    out.print(f"{adapter}: {found.said}", highlight=False, markup=False, soft_wrap=True)
    for name, value in said["metrics"].items():
        mark = " (main)" if name == found.task.metric else ""
        out.print(f"{name:>18}  {value:.4f}   {_beside(said['majority'], name)}{mark}")


def _scored(
    subject: Subject,
    found: Rows,
    how: Asked,
    scoring: str,
    head: Path | None,
    precision: str,
) -> dict[str, Any]:
    """Every metric on the rows, beside what a constant answer scores."""
    import numpy as np

    from orthomerge.evaluation.classification import score
    from orthomerge.tasks import majority

    about, test = found.task, found.rows
    truth = [row.label for row in test]
    if how.prompt:
        scores = _by_words(subject, about, how, scoring, test, precision)
    else:
        predictions = _predictions(subject, about, how, subject.head(head, about), test, precision)
        scores = score(about.kind, predictions, truth, about.outputs)
    constant = np.full(len(test), majority(test, about.kind))
    return {
        "task": about.name, "n": len(test), "of": found.of, "rows": found.what,
        "labels": list(about.labels), "form": "text" if how.prompt else "classifier",
        "max_length": how.max_length, "precision": precision, "metric": about.metric,
        "metrics": scores,
        "majority": score(about.kind, constant, truth, about.outputs),
    }  # fmt: skip


def _by_words(
    subject: Subject,
    about: Task,
    how: Asked,
    scoring: str,
    test: Sequence[Row],
    precision: str,
) -> dict[str, float]:
    """The metrics of a language model's answers."""
    from orthomerge.evaluation.text import TextEvaluator
    from orthomerge.models.loading import in_precision, load_language_model, load_tokenizer

    assert how.prompt is not None
    path = subject.found.path_or_id
    judge = TextEvaluator(
        in_precision(load_language_model(path), precision),
        load_tokenizer(path),
        max_length=how.max_length,
    )
    with work_bar(f"evaluating {about.name}") as progress:
        answers = judge.predict(
            test, how.prompt, subject.layers, scoring=scoring, progress=progress
        )
    return answers.metrics(about.kind, [row.label for row in test], about.outputs)


def _predictions(
    subject: Subject,
    about: Task,
    how: Asked,
    weights: Mapping[str, Tensor] | None,
    test: Sequence[Row],
    precision: str,
) -> Any:
    """What the base with the adapter and a head predicts."""
    from orthomerge.evaluation.classification import Evaluator
    from orthomerge.models.loading import load_tokenizer

    path = subject.found.path_or_id
    evaluator = Evaluator(
        path, load_tokenizer(path), max_length=how.max_length, precision=precision
    )
    with work_bar(f"evaluating {about.name}") as progress:
        return evaluator.predict(
            test, subject.layers, weights, num_labels=about.outputs,
            regression=about.regression, progress=progress,
        )  # fmt: skip


def _beside(constant: dict[str, float], name: str) -> str:
    """What a constant answer scores, where it scores at all."""
    return f"a constant answer {constant[name]:.4f}" if name in constant else ""
