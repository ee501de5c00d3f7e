"""`orthomerge distill`: a merge trained to give each adapter's own answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, out, parse_numbers, parse_options, print_json
from orthomerge.cli._checks import check_inputs
from orthomerge.cli._form import Chat
from orthomerge.cli._options import Count, CountOrNone, Json, MethodOptions, Output, Overwrite, Rate
from orthomerge.cli._progress import Quiet, Report, work_bar
from orthomerge.cli._rows import check_files
from orthomerge.errors import MergeError
from orthomerge.training.distillation.settings import DistillSettings

if TYPE_CHECKING:
    from orthomerge.tasks import Prompt, Task
    from orthomerge.training.distillation import Distilled, Measured, Progress


@app.command()
def distill(
    adapters: list[str],
    data: Annotated[list[str], typer.Option()],
    output: Output,
    start: Annotated[Path | None, typer.Option("--from")] = None,
    method: str = "linear",
    weights: str | None = None,
    option: MethodOptions = None,
    layer_wise: Annotated[bool, typer.Option("--layer-wise")] = False,
    rank: str | None = None,
    samples: Annotated[int, typer.Option(min=2)] = 100,
    steps: Annotated[int, typer.Option(min=0)] = DistillSettings.steps,
    learning_rate: Rate = DistillSettings.learning_rate,
    batch_size: Count = DistillSettings.batch_size,
    max_length: Annotated[int | None, typer.Option(min=2)] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.9)] = DistillSettings.held_out,
    patience: CountOrNone = None,
    problem: list[str] | None = None,
    form: str | None = None,
    template: str | None = None,
    chat: Chat = False,
    answer_tokens: CountOrNone = None,
    pooling: str | None = None,
    cache: Path | None = None,
    base: str | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    seed: int = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters and train the result, without labels, to answer as each of them does alone.

    Use it where you have some texts of every task: about a hundred each are enough. The result is
    an ordinary PEFT adapter; each task keeps its own head beside it.

    Example: [bold]orthomerge distill a/ b/ --data a.jsonl --data b.jsonl --output merged/[/]

    In words: [bold]orthomerge distill a/ b/ --data sentiment --data topic --output merged/[/]

    As small as one of them: [bold]orthomerge distill a/ b/ --data a.jsonl --data b.jsonl --rank 8
    --output merged/[/]

    A further adapter joins: [bold]orthomerge distill merged/heads/a.safetensors
    merged/heads/b.safetensors c/ --data a.jsonl --data b.jsonl --data c.jsonl --output three/[/]

    Without the texts of a and b: [bold]orthomerge distill merged/ c/ --data c.jsonl --data c.jsonl
    --output three/[/]

    Args:
        adapters: PEFT adapter folders or hub ids (org/name, org/name@rev), in order. A merge's
            folder stands for all tasks whose heads it has, one head's file in it for that task.
        data: Unlabelled texts of each adapter's task, in the adapters' order: a JSONL, CSV or
            Parquet file, a hub data set, or a task of 'orthomerge list tasks'; repeat.
        output: The folder to write.
        start: A merged adapter to begin from, instead of --method.
        method: The merging method to begin from.
        weights: Weights of the merge to begin from, one per adapter (1,1,0.5) or one for all;
            default what comes nearest to the adapters' answers.
        layer_wise: Merge layer after layer, each on the inputs that the layers merged so far give:
            with --method regmean and --steps 0 that is RegMean++.
        rank: Rank of the result, or 'auto': the smallest that begins about as near as the whole
            merge. Default the merge's own, the sum of the adapters' ranks.
        samples: Texts of each task.
        batch_size: Texts of each task in a step.
        max_length: Tokens of a text; default 48 with heads, in words what the adapter was trained
            with, otherwise 128.
        held_out: Share of the texts that measures the agreement.
        patience: Stop after so many measurements without gain; default never.
        problem: What each head's outputs are: single_label_classification,
            multi_label_classification or regression; default by their number. Repeat, in order.
        form: classifier, text (a language model's words) or embedding; default what the adapters
            say.
        template: With tasks in words: an instruction with {text}, or a file of one; default the
            one the adapter was trained with, else the task's own.
        answer_tokens: Tokens that each adapter writes after a text that is no task, to be compared;
            default none, the text's own are.
        pooling: Embedding models: mean, cls or last; default what the base says.
        cache: Folder that keeps the adapters' answers for further runs.
        base: Base model; default the one the adapters name.
        text_column: Column of the text.
        pair_column: Column of a second text; default 'pair' where there is one.
        seed: Seed of the sample and of the batches.
    """
    from orthomerge.io.outputs import require_free

    check_inputs(adapters)
    check_files(*data)
    require_free(output, inputs=adapters, base=base, overwrite=overwrite)
    from orthomerge.cli._processes import several_processes
    from orthomerge.training.distillation import distill_adapters, form_of_adapters

    settings = DistillSettings(
        steps=steps, learning_rate=learning_rate, batch_size=batch_size, max_length=max_length,
        held_out=held_out, patience=patience, seed=seed,
    )  # fmt: skip
    given = parse_numbers(weights, "weights")
    form = form_of_adapters(adapters, form, base=base)
    tasks = [_task(item) for item in data]
    prompts = None
    if form == "text":
        prompts = [
            _prompt(named, task, template, chat)
            for named, task in zip(adapters, tasks, strict=False)
        ]
    elif chat:
        raise MergeError("--chat is for language models, which answer in words.")
    with several_processes() as job, work_bar("distilling") as bar:
        distilled = distill_adapters(
            adapters,
            [_texts(item, task) for item, task in zip(data, tasks, strict=True)],
            start=start,
            layer_wise=layer_wise,
            method=method,
            weights=given[0] if given and len(given) == 1 else given,
            rank=_rank(rank),
            samples=samples,
            settings=settings,
            problems=problem,
            form=form,
            prompts=prompts,
            answer_tokens=answer_tokens,
            pooling=pooling,
            base=base,
            text_column=text_column,
            pair_column=pair_column,
            output=output,
            overwrite=overwrite,
            cache=cache,
            progress=_shown(bar),
            **parse_options(option or []),
        )
    if job.rank > 0:
        return
    if json:
        print_json({"path": str(output), **_said(distilled)})
        return
    first, best = distilled.measured[0], distilled.best
    for task, value in best.agreement.items():
        out.print(
            f"{task:>18}  agreement {value:.3f}   before {first.agreement[task]:.3f}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    out.print(f"{output}: {len(adapters)} adapters in one, {_cost(distilled)}.", soft_wrap=True)


def _task(data: str) -> Task | None:
    """The task of that name, if it is one."""
    from orthomerge.tasks import get_task, list_tasks

    return get_task(data) if data in [t.name for t in list_tasks()] else None


def _texts(data: str, task: Task | None) -> Any:
    """A task's training texts, or the name of the file or data set."""
    return [(r.text, r.pair) for r in task.pools()["train"]] if task else data


def _prompt(named: str, task: Task | None, template: str | None, chat: bool) -> Prompt | None:
    """How a language model is asked: as is said, else as it was trained, else the task's own way.

    None for texts that are no task, under an adapter whose record does not say how it is asked.
    """
    from orthomerge.adapters import read_adapter
    from orthomerge.records import learnt_by, learnt_for
    from orthomerge.tasks import prompt_of

    known = [item for item in learnt_by(read_adapter(named).path) if item.prompt]
    if task is None:
        prompt = known[0].prompt if len(known) == 1 else None
        if template is not None or (chat and prompt is None):
            raise MergeError(
                f"--{'chat' if template is None else 'template'} asks tasks of 'orthomerge list "
                "tasks': name some with --data."
            )
        return replace(prompt, chat=True) if chat and prompt else prompt
    learnt = learnt_for(known, task.name, task.labels)
    if learnt is None or template is not None or chat:
        return prompt_of(task, template, chat=chat)
    return learnt.prompt


def _rank(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise MergeError(f"rank '{text}': it is a whole number above 0, or auto.")
    return int(text)


def _shown(bar: Report) -> Progress:
    """The bar, and a line for every measurement."""
    from orthomerge.cli._progress import bars

    def show(what: str, done: int, of: int, measured: Measured | None) -> None:
        if what == "measured" and measured is not None:
            by_task = ", ".join(f"{t} {v:.3f}" for t, v in measured.agreement.items())
            bars.print(
                f"step {done}: agreement {measured.mean:.3f} ({by_task})",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        elif what == "training":
            bar(done, of, measured.mean if measured else None)

    return show


def _said(distilled: Distilled) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "agreement": distilled.best.agreement,
        "distance": distilled.best.distance,
        "best_step": distilled.best.step,
        "measured": [asdict(m) for m in distilled.measured],
        "scale": distilled.scale,
        "ranks": {n: f.rank for n, f in distilled.factors.items()},
        "texts": distilled.texts,
        "seconds": distilled.seconds,
        "teachers": distilled.kept,
    }


def _cost(distilled: Distilled) -> str:
    from orthomerge.io.units import human_size

    texts, seconds = sum(distilled.texts.values()), sum(distilled.seconds.values())
    rank = max(f.rank for f in distilled.factors.values())
    best = distilled.best.step
    kept = f"{human_size(distilled.kept['bytes'])} of {distilled.kept['type']}"
    return f"rank {rank}, {texts} texts (answers {kept}), step {best} kept, {seconds:.0f} s"
