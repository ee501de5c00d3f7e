"""`orthomerge stats inspect`, `merge` and `publish`: what teams do with statistics files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import out, print_json, table
from orthomerge.cli._options import Json, Output
from orthomerge.cli._progress import Quiet, adding, work_bar
from orthomerge.cli.stats import stats
from orthomerge.io.units import human_size

if TYPE_CHECKING:
    from orthomerge.statistics import InputSummary, StatisticsMeta


@stats.command()
def inspect(
    file: Path,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What is in a statistics file, its size, its spectrum, and what it gives away.

    Example: [bold]orthomerge stats inspect mine.stats.safetensors[/]

    Args:
        file: A statistics file.
    """
    from dataclasses import asdict

    from orthomerge.statistics import Statistics, disclosure, summarize

    statistics = Statistics.load(file, lazy=True)
    size = file.stat().st_size
    with work_bar("spectra") as progress:
        inputs = summarize(statistics, adding(progress, len(statistics.moments)))
    disclosed = disclosure(statistics.meta, inputs)
    if json:
        entries = [i._asdict() | {"spectrum": i.spectrum._asdict()} for i in inputs]
        print_json(
            {
                "path": str(file),
                "bytes": size,
                **asdict(statistics.meta),
                "inputs": entries,
                "gives_away": disclosed,
            }
        )
        return
    _print_meta(file, size, statistics.meta)
    _print_tables(inputs)
    out.print("What it gives away:", highlight=False)
    for sentence in disclosed:
        out.print(f"- {sentence}", highlight=False, markup=False)


@stats.command()
def merge(
    files: list[Path],
    output: Output,
    json: Json = False,
) -> None:
    """One statistics file over all samples, as collecting over all of them at once would give.

    Example: [bold]orthomerge stats merge monday.stats.safetensors tuesday.stats.safetensors
    --output mine.stats.safetensors[/]

    Args:
        files: Statistics of parts of one task's data.
        output: The statistics file to write.
    """
    from dataclasses import asdict

    from orthomerge.io.outputs import require_free_file
    from orthomerge.statistics import Statistics, merge_statistics
    from orthomerge.statistics.file import is_statistics

    require_free_file(output, is_statistics, inputs=files)
    read = [Statistics.load(path) for path in files]
    for path, item in zip(files[1:], read[1:], strict=True):
        item.require_match(read[0], mine=f"'{path}'", theirs=f"'{files[0]}'")
    total = merge_statistics(read)
    total.save(output)
    if json:
        print_json({"path": str(output), **asdict(total.meta), "layers": total.layers})
        return
    out.print(f"{output}: {len(files)} files, {total.meta.samples} samples.", soft_wrap=True)


@stats.command()
def publish(
    file: Path,
    directions: Annotated[int, typer.Option()],
    output: Output,
    noise: float = 0.0,
    noise_seed: int | None = None,
    json: Json = False,
) -> None:
    """Only the strongest directions of a file, with noise: less is revealed, nothing is guaranteed.

    This is not differential privacy (rows are not clipped, nothing is accounted for).

    Example: [bold]orthomerge stats publish mine.stats.safetensors --directions 32 --noise 0.1
    --output public.stats.safetensors[/]

    Args:
        file: A whole statistics file.
        directions: The strongest directions of every input.
        output: The statistics file to write.
        noise: Gaussian noise on them, in units of the mean energy of a direction.
        noise_seed: Repeat the noise, for tests; secure and fresh without.
    """
    from dataclasses import asdict

    from orthomerge.io.outputs import require_free_file
    from orthomerge.statistics import Statistics
    from orthomerge.statistics.file import is_statistics

    require_free_file(output, is_statistics, inputs=[file])
    part = Statistics.load(file).published(directions, noise, noise_seed)
    part.save(output)
    if json:
        print_json({"path": str(output), **asdict(part.meta), "layers": part.layers})
        return
    out.print(
        f"{output}: the top {directions} directions of {len(part.moments)} inputs, noise "
        f"{noise:g}; this is not differential privacy.",
        soft_wrap=True,
    )


def _print_meta(file: Path, size: int, meta: StatisticsMeta) -> None:
    def short(digest: str | None) -> str:
        return digest[:12] if digest else "not recorded"

    part = "everything"
    if meta.directions is not None:
        part = f"the top {meta.directions} directions, noise {meta.noise:g}"
    for name, value in (
        ("file", f"{file}, {human_size(size)}, format {meta.format}, {meta.tool}"),
        ("model", f"{meta.model_id}, revision {short(meta.model_revision)}, {meta.dtype}"),
        ("config", short(meta.config_hash)),
        ("weights", short(meta.model_sha256)),
        ("tokenizer", short(meta.tokenizer_hash)),
        ("targets", ", ".join(meta.target_modules)),
        ("form", "text, prompt " + short(meta.prompt) if meta.form == "text" else meta.form),
        ("granularity", meta.granularity),
        ("max length", f"{meta.max_length} tokens" if meta.max_length else "not recorded"),
        ("samples", f"{meta.samples:,}"),
        ("published", part),
    ):
        out.print(f"{name:<12}{value}", highlight=False, markup=False, soft_wrap=True)


def _print_tables(inputs: Sequence[InputSummary]) -> None:
    """A line for all inputs that are held alike and read by like layers of other blocks."""
    from statistics import median

    from orthomerge.statistics import Spectrum, layer_label

    groups: dict[Any, list[InputSummary]] = {}
    for item in inputs:
        label = re.sub(r"\.\d+\.", ".*.", layer_label(item.layers))
        held = (item.width, item.kind, item.rows, item.kept, item.exact)
        groups.setdefault((label, held), []).append(item)
    out.print("inputs", highlight=False)
    held = table("#", "inputs", "width", "form", "rows", "kept", "exact", "slack", "size")
    spectra = table(
        "#", "trace", "top share", "effective rank", "90 % in", "99 % in", "least/mean",
        caption="medians where several inputs are alike; each one with --json",
    )  # fmt: skip
    for number, ((label, _), items) in enumerate(groups.items(), 1):
        out.print(f"{number:>4}  {label}", highlight=False, markup=False, soft_wrap=True)
        first = items[0]
        slacks = [i.slack for i in items if i.slack is not None]
        worst = max(slacks) if len(slacks) == len(items) else None
        held.add_row(
            str(number),
            str(len(items)),
            str(first.width),
            first.kind,
            f"{first.rows:,}",
            "-" if first.kept is None else f"{first.kept:,}",
            "yes" if first.exact else "no",
            "unknown" if worst is None else f"{worst:.1e}" if worst else "0",
            human_size(sum(i.bytes for i in items)),
        )
        shape = Spectrum(*map(median, zip(*(i.spectrum for i in items), strict=True)))
        spectra.add_row(
            str(number),
            f"{shape.trace:.4g}",
            f"{shape.top_share:.1%}",
            f"{shape.effective_rank:.1f}",
            f"{shape.directions_90:.0f}",
            f"{shape.directions_99:.0f}",
            f"{shape.smallest:.1e}",
        )
    out.print(held)
    out.print(spectra)
