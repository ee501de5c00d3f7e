"""`orthomerge stats fisher`: an adapter's Fisher information as a file."""

from __future__ import annotations

from pathlib import Path

from orthomerge.cli._app import app, out, print_json
from orthomerge.cli._form import Chat, Form, TemplateText, asked, form_of
from orthomerge.cli._options import (
    Count,
    CountOrNone,
    Json,
    MaxLength,
    Output,
    TaskName,
    file_paths,
)
from orthomerge.cli._progress import Quiet, adding, work_bar
from orthomerge.cli._rows import check_files
from orthomerge.cli.stats import stats
from orthomerge.io.units import human_size


@app.command("fisher", hidden=True)
@stats.command("fisher")
def fisher(
    adapter: Path,
    task: TaskName,
    output: Output,
    samples: Count = 100,
    base: str | None = None,
    batch_size: CountOrNone = None,
    max_length: MaxLength = None,
    form: Form = None,
    template: TemplateText = None,
    chat: Chat = False,
    seed: int = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How much each weight matters to an adapter's answers, for the merging method 'fisher'.

    Example: [bold]orthomerge stats fisher mine/ --task sentiment --output
    mine.fisher.safetensors[/]

    A language model's adapter is asked with the prompt that it was trained with.

    Args:
        adapter: A PEFT folder; a classifier's with its head.
        output: The file to write.
        samples: Rows of the task, without labels.
        base: Base model; default the adapter's.
        batch_size: Rows at a time; default 16, of a language model 2, which takes less memory in
            the same time.
        seed: Seed of the rows.
    """
    from orthomerge.adapters import read_adapter, require_form
    from orthomerge.fisher import save_fisher
    from orthomerge.fisher.file import is_fisher
    from orthomerge.io.outputs import require_free_file
    from orthomerge.records import learnt_by, learnt_for
    from orthomerge.tasks import get_task
    from orthomerge.tuning import adapter_fisher

    require_free_file(output, is_fisher, inputs=[adapter, *file_paths([task])], base=base)
    check_files(task)
    read, about = read_adapter(adapter, base=base), get_task(task)
    kind = form_of(form, read.config.get("task_type"), words=template is not None or chat)
    require_form(read, kind)
    how = asked(
        about, kind, template, chat=chat, max_length=max_length,
        learnt=learnt_for(learnt_by(read.path), about.name, about.labels),
    )  # fmt: skip
    with work_bar(f"Fisher information on {task}") as progress:
        found, meta = adapter_fisher(
            adapter,
            task,
            base=base,
            samples=samples,
            seed=seed,
            # Its memory is a graph for each row of a batch, over the vocabulary in words.
            batch_size=batch_size or (2 if how.prompt else 16),
            max_length=how.max_length,
            prompt=how.prompt,
            progress=adding(progress, samples),
        )
    save_fisher(output, found, meta)
    size = output.stat().st_size
    if json:
        print_json(
            {"path": str(output), "task": meta.task, "samples": meta.samples,
             "form": meta.form, "layers": len(found), "bytes": size}
        )  # fmt: skip
        return
    out.print(
        f"{output}: Fisher information of {len(found)} layers on {meta.samples} rows of "
        f"{meta.task}{' in words' if how.prompt else ''}, {human_size(size)}.",
        soft_wrap=True,
    )
