"""`orthomerge stats`: collecting, unless a verb on files is named (`stats_files`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from orthomerge.cli._app import app, out, print_json, split_names
from orthomerge.cli._form import LENGTH, Chat, Form, TemplateText, form_of
from orthomerge.cli._options import Count, Json, Output, Precision, file_paths
from orthomerge.cli._progress import Quiet
from orthomerge.cli._rows import check_files
from orthomerge.cli._stats_lines import grouped, kinds_of, published_line, sizes, unreached
from orthomerge.errors import RecipeError, nearest
from orthomerge.io.units import parse_size

if TYPE_CHECKING:
    from orthomerge.moments import Representation
    from orthomerge.tasks import Prompt, Task


class _CollectsByDefault(TyperGroup):
    """`orthomerge stats MODEL ...` collects: what is none of the verbs is the first argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            collects = any(a.partition("=")[0] == "--data" for a in args)
            if collects or not nearest(args[0], self.commands):  # else a verb was mistyped
                args = ["collect", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        collect_verb = self.commands["collect"]
        inner = typer.Context(collect_verb, info_name="collect", parent=ctx)
        collect_verb.format_help(inner, formatter)


stats = typer.Typer(
    name="stats",
    cls=_CollectsByDefault,
    no_args_is_help=True,
    subcommand_metavar="MODEL ... | COMMAND ...",
    help="""Statistics of layer inputs as a file: collect them, look into a file, merge, publish.

    Without a command's name, collect.

    Examples:

    [bold]orthomerge stats minilm --data texts.jsonl --output mine.stats.safetensors[/]

    [bold]orthomerge stats inspect mine.stats.safetensors[/]

    [bold]orthomerge stats merge monday.stats.safetensors tuesday.stats.safetensors --output
    mine.stats.safetensors[/]

    [bold]orthomerge stats publish mine.stats.safetensors --directions 32 --noise 0.1 --output
    public.stats.safetensors[/]""",
    short_help="Second moments of layer inputs over a small sample: collect, inspect, merge.",
)
app.add_typer(stats)


@stats.command()
def collect(
    model: str,
    data: Annotated[str, typer.Option()],
    output: Output,
    targets: str | None = None,
    samples: Count = 100,
    granularity: str = "token",
    text_column: str = "text",
    pair_column: str | None = None,
    max_length: Annotated[int, typer.Option(min=2)] = LENGTH,
    form: Form = None,
    template: TemplateText = None,
    chat: Chat = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: int = 0,
    representation: str = "auto",
    rows: int | None = None,
    size: int | None = None,
    budget: str = "1GiB",
    directions: int | None = None,
    noise: float | None = None,
    noise_seed: int | None = None,
    device_map: str | None = None,
    precision: Precision = "float32",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Second moments of the inputs of the layers to adapt, over a small unlabelled sample.

    The file holds no text; give it to the teams whose adapters will be merged with yours. Several
    processes share the work: [bold]accelerate launch --num_processes 2 -m orthomerge stats ...[/]

    With --form text the data is a task, and its texts are read as a language model reads them in
    training: in the task's prompt, followed by one of its answers. Every token of both counts, the
    end token and padding never; labels are not looked at.

    Example: [bold]orthomerge stats minilm --data texts.jsonl --output mine.stats.safetensors[/]

    In words: [bold]orthomerge stats llama/ --form text --data sentiment --targets q_proj,v_proj
    --output mine.stats.safetensors[/]

    Args:
        model: Base model: a folder, a packaged id or a hub id.
        data: Unlabelled texts: JSONL, CSV or Parquet file, hub data set, task.
        output: The statistics file to write.
        targets: Layers that will be adapted, as q_proj,v_proj, or all-linear; default those that
            PEFT adapts in models of the base's type.
        samples: Texts drawn from the data.
        granularity: token, sample or task_mean.
        text_column: Column of the text.
        pair_column: Column of a second text.
        max_length: Tokens of a text or a prompt.
        seed: Seed of the sample.
        representation: How moments are held: auto (by width and budget), full, rows, sketch.
        rows: Most rows of a row form; 1024 by default.
        size: Directions of a sketch; 64 by default.
        budget: Memory for all moments, by which auto chooses: 512MiB, 2GiB, bytes.
        directions: Write only the strongest directions of every input.
        noise: Gaussian noise on them, in units of the mean energy of a direction; no differential
            privacy.
        noise_seed: Repeat the noise, for tests; secure and fresh without.
        device_map: Spread a large base: auto, a device, or JSON of module to device.
    """
    from orthomerge.io.outputs import require_free_file

    check_files(data)
    require_free_file(output, _is_statistics, inputs=file_paths([data]), base=model)
    if directions is None and (noise is not None or noise_seed is not None):
        raise RecipeError("noise is put on published directions: say how many with --directions.")
    from orthomerge.cli._collect import Reading, load_base, measured
    from orthomerge.cli._processes import several_processes
    from orthomerge.statistics import sample_texts

    held = _representation(representation, rows, size, budget)
    with several_processes() as process:
        if device_map is not None and process.world > 1:
            raise RecipeError(
                "--device-map spreads the base over all devices, so it runs in one process: leave "
                "out 'accelerate launch', or --device-map."
            )
        about, prompt = _task(data, form, template, chat, text_column, pair_column)
        texts = _texts(data, about, text_column, pair_column)
        how = Reading(
            split_names(targets) if targets else None, granularity, held, prompt, max_length,
            batch_size, data, about.name if about else Path(data).stem,
        )  # fmt: skip
        base = load_base(model, how, process, device_map, precision)
        statistics = measured(base, sample_texts(texts, samples, seed), how, process)
        if process.rank > 0:
            return
        kinds = kinds_of(statistics)
        counted = next(iter(statistics.moments.values())).count
        if directions is not None:
            statistics = statistics.published(directions, noise or 0.0, noise_seed)
        statistics.save(output)
    if json:
        meta = {**asdict(statistics.meta), "layers": statistics.layers}
        print_json({"path": str(output), **meta, "representations": kinds})
        return
    read = f"{counted} rows ({granularity}{', of prompts and answers' if prompt else ''})"
    out.print(f"{output}: {sizes(statistics)}, {read}.", soft_wrap=True)
    for line in [*grouped(kinds, statistics), *unreached(statistics)]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if directions is not None:
        out.print(published_line(directions, noise or 0.0), highlight=False, soft_wrap=True)


def _is_statistics(file: Path) -> bool:
    from orthomerge.statistics.file import is_statistics

    return is_statistics(file)


def _representation(name: str, rows: int | None, size: int | None, budget: str) -> Representation:
    """How moments are held, from what was said of it."""
    from orthomerge.moments import Representation

    bounds = {"rows": rows, "size": size, "budget": parse_size(budget)}
    return Representation(name, **{k: v for k, v in bounds.items() if v is not None}).check()


def _texts(
    data: str, about: Task | None, text_column: str, pair_column: str | None
) -> list[tuple[str, str | None]]:
    """A task's training texts, or those of a file or data set."""
    from orthomerge.statistics import read_texts

    if about:
        return [(r.text, r.pair) for r in about.pools()["train"]]
    return read_texts(data, text_column=text_column, pair_column=pair_column)


def _task(
    data: str,
    form: str | None,
    template: str | None,
    chat: bool,
    text_column: str,
    pair_column: str | None,
) -> tuple[Task | None, Prompt | None]:
    """The task that the data is, by name or in words by file, and how it is asked in words.

    Raises:
        RecipeError: no such form, a template without words, or columns named for a task.
        UnknownNameError, TaskError: words for what is no task, or a template that does not fit.
    """
    from orthomerge.tasks import get_task, list_tasks, prompt_of

    if form_of(form, None, words=template is not None or chat) == "classifier":
        return (get_task(data) if data in [t.name for t in list_tasks()] else None), None
    if text_column != "text" or pair_column is not None:
        raise RecipeError(
            "--form text reads a task, whose columns are 'text', 'pair' and 'label': rename the "
            "columns of the table."
        )
    about = get_task(data)
    return about, prompt_of(about, template, chat=chat)
