"""`orthomerge stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, print_json, split_names


@app.command()
def stats(
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
    max_length: Annotated[int, typer.Option(min=2, help="Tokens kept of a text.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Second moments of the inputs of the layers to adapt, over a small unlabelled sample.

    The file holds no text; give it to the teams whose adapters will be merged with yours.

    Example: [bold]orthomerge stats minilm --data texts.jsonl --output mine.stats.safetensors[/]
    """
    from dataclasses import asdict

    from rich.progress import Progress

    from orthomerge.assets import resolve_model
    from orthomerge.cli._app import err
    from orthomerge.features import (
        batches,
        collect_statistics,
        read_texts,
        sample_texts,
        target_layers,
    )
    from orthomerge.models import load_tokenizer, load_trunk, tokenizer_hash
    from orthomerge.tasks import get_task, list_tasks

    if data in [t.name for t in list_tasks()]:
        texts = [(r.text, r.pair) for r in get_task(data).pools()["train"]]
    else:
        texts = read_texts(data, text_column=text_column, pair_column=pair_column)
    found = resolve_model(model)
    trunk = load_trunk(found.path_or_id)
    names = split_names(targets)
    target_layers(trunk, names)
    tokenizer = load_tokenizer(found.path_or_id)
    chosen = sample_texts(texts, samples, seed)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(f"statistics of {data}", total=len(chosen))
        statistics = collect_statistics(
            trunk,
            batches(chosen, tokenizer, batch_size=batch_size, max_length=max_length),
            names,
            granularity=granularity,
            model_id=found.name,
            model_sha256=found.sha256,
            tokenizer_hash=tokenizer_hash(tokenizer),
            progress=lambda size: progress.advance(bar, size),
        )
    statistics.save(output)
    if json:
        print_json({"path": str(output), **asdict(statistics.meta), "layers": statistics.layers})
        return
    rows = next(iter(statistics.moments.values())).count
    out.print(
        f"{output}: {len(statistics.moments)} distinct inputs of {len(statistics.layers)} layers, "
        f"{statistics.meta.samples} samples, {rows} rows ({granularity}).",
        soft_wrap=True,
    )
