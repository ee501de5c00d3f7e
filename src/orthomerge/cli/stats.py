"""`orthomerge stats`: collecting, unless a verb on files is named (`stats_files`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from orthomerge.cli._app import app, out, print_json, split_names
from orthomerge.cli._form import Form, TemplateText, check_form, prompt_for
from orthomerge.cli._progress import Quiet, adding, work_bar
from orthomerge.cli._stats_lines import grouped, kinds_of
from orthomerge.errors import RecipeError, nearest
from orthomerge.units import parse_size

if TYPE_CHECKING:
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
    model: Annotated[str, typer.Argument(help="Base model: a folder, a packaged id or a hub id.")],
    data: Annotated[
        str, typer.Option(help="Unlabelled texts: JSONL, CSV or Parquet file, hub data set, task.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics file to write.")],
    targets: Annotated[str, typer.Option(help="Layers that will be adapted.")] = "query,value",
    samples: Annotated[int, typer.Option(min=1, help="Texts drawn from the data.")] = 100,
    granularity: Annotated[str, typer.Option(help="token, sample or task_mean.")] = "token",
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    pair_column: Annotated[str | None, typer.Option(help="Column of a second text.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a text or a prompt.")] = 128,
    form: Form = "classifier",
    template: TemplateText = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    representation: Annotated[
        str,
        typer.Option(help="How moments are held: auto (by width and budget), full, rows, sketch."),
    ] = "auto",
    rows: Annotated[
        int | None, typer.Option(help="Most rows of a row form; 1024 by default.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Directions of a sketch; 64 by default.")] = None,
    budget: Annotated[
        str,
        typer.Option(help="Memory for all moments, by which auto chooses: 512MiB, 2GiB, bytes."),
    ] = "1GiB",
    directions: Annotated[
        int | None, typer.Option(help="Write only the strongest directions of every input.")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Gaussian noise on them, in units of the mean energy of a direction; no "
            "differential privacy."
        ),
    ] = None,
    noise_seed: Annotated[
        int | None, typer.Option(help="Repeat the noise, for tests; secure and fresh without.")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread a large base: auto, a device, or JSON of module to device."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
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
    """
    from dataclasses import asdict

    from orthomerge.assets import resolve_model
    from orthomerge.cli._job import several_processes
    from orthomerge.features import (
        batches,
        collect_statistics,
        read_texts,
        sample_texts,
        target_layers,
    )
    from orthomerge.models import (
        exact_device,
        language_task_type,
        load_tokenizer,
        load_trunk,
        tokenizer_hash,
    )
    from orthomerge.moments import Representation
    from orthomerge.prompting import Wording

    bounds = {"rows": rows, "size": size, "budget": parse_size(budget)}
    held = Representation(
        representation, **{k: v for k, v in bounds.items() if v is not None}
    ).check()
    if directions is None and (noise is not None or noise_seed is not None):
        raise RecipeError("noise is put on published directions: say how many with --directions.")
    with several_processes() as job:
        if device_map is not None and job.world > 1:
            raise RecipeError(
                "--device-map spreads the base over all devices, so it runs in one process: leave "
                "out 'accelerate launch', or --device-map."
            )
        about, prompt = _task(data, form, template, text_column, pair_column)
        if about:
            texts = [(r.text, r.pair) for r in about.pools()["train"]]
        else:
            texts = read_texts(data, text_column=text_column, pair_column=pair_column)
        found = resolve_model(model)
        if prompt:
            language_task_type(found.path_or_id)  # refuses what writes no text
        trunk = load_trunk(found.path_or_id, device_map=_device_map(device_map))
        if device_map is None:
            trunk = trunk.to(job.device or exact_device())
        names = split_names(targets)
        target_layers(trunk, names)
        tokenizer = load_tokenizer(found.path_or_id)
        chosen = sample_texts(texts, samples, seed)
        with work_bar(f"statistics of {data}") as progress:
            advance = adding(progress, len(chosen))
            statistics = collect_statistics(
                trunk,
                Wording.of(prompt, tokenizer, trunk.config, max_length).batches(
                    chosen, batch_size=batch_size
                )
                if prompt
                else batches(chosen, tokenizer, batch_size=batch_size, max_length=max_length),
                names,
                granularity=granularity,
                representation=held,
                task=about.name if about else Path(data).stem,
                model_id=found.name,
                model_sha256=found.sha256,
                tokenizer_hash=tokenizer_hash(tokenizer),
                prompt=prompt.fingerprint if prompt else None,
                # The other processes are about as far.
                progress=lambda done: advance(done * job.world),
            )
        if job.rank > 0:
            return
        kinds = kinds_of(statistics)
        counted = next(iter(statistics.moments.values())).count
        if directions is not None:
            statistics = statistics.published(directions, noise or 0.0, noise_seed)
        statistics.save(output)
    if json:
        meta = asdict(statistics.meta)
        print_json(
            {"path": str(output), **meta, "layers": statistics.layers, "representations": kinds}
        )
        return
    out.print(
        f"{output}: {len(statistics.moments)} distinct inputs of {len(statistics.layers)} layers, "
        f"{statistics.meta.samples} samples, {counted} rows ({granularity}"
        f"{', of prompts and answers' if prompt else ''}).",
        soft_wrap=True,
    )
    for line in grouped(kinds, statistics):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if directions is not None:
        out.print(
            f"  published: the top {directions} directions, noise {noise or 0:g}; this is not "
            "differential privacy.",
            highlight=False,
            soft_wrap=True,
        )


def _task(
    data: str, form: str, template: str | None, text_column: str, pair_column: str | None
) -> tuple[Task | None, Prompt | None]:
    """The task that the data is, by name or in words by file, and how it is asked in words.

    Raises:
        RecipeError: no such form, a template without words, or columns named for a task.
        UnknownNameError, TaskError: words for what is no task, or a template that does not fit.
    """
    from orthomerge.tasks import get_task, list_tasks

    check_form(form, template)
    if form == "classifier":
        return (get_task(data) if data in [t.name for t in list_tasks()] else None), None
    if form == "text" and (text_column != "text" or pair_column is not None):
        raise RecipeError(
            "--form text reads a task, whose columns are 'text', 'pair' and 'label': rename the "
            "columns of the table."
        )
    about = get_task(data)
    return about, prompt_for(about, form, template)


def _device_map(text: str | None) -> Any:
    """A device map as Transformers takes it.

    Raises:
        RecipeError: JSON that is not an object.
    """
    import json

    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as problem:
        raise RecipeError(
            f"""device map '{text}' is not JSON ({problem}): write it as '{{"": "cpu"}}'."""
        ) from problem
