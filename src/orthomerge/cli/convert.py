"""`orthomerge convert`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, out, parse_options, print_json, table
from orthomerge.cli._options import (
    Count,
    CountOrNone,
    Json,
    Output,
    Overwrite,
    Rate,
    SolverOptions,
    file_paths,
)
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.errors import RecipeError

if TYPE_CHECKING:
    from orthomerge.adapters import Converted
    from orthomerge.adapters.refit import Loss


@app.command()
def convert(
    adapters: list[str],
    output: Output,
    stats: Annotated[list[Path] | None, typer.Option("--stats", "--own")] = None,
    others: list[Path] | None = None,
    subspace: str = "low_energy",
    refit: str = "outputs",
    balance: float | None = None,
    ridge: float | None = None,
    energy_fraction: float | None = None,
    subspace_dim: CountOrNone = None,
    solver: str = "min_eigen",
    option: SolverOptions = None,
    recover: Annotated[int, typer.Option(min=0)] = 0,
    task: list[str] | None = None,
    learning_rate: Rate = 2e-3,
    rows: Count = 400,
    base: str | None = None,
    seed: int = 0,
    layers: Annotated[bool, typer.Option("--layers")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert adapters that exist already, so that they disturb each other less in a merge.

    Rank, scaling, head and everything else stay; what each layer lost is printed and kept in
    convert.json. With several adapters every one's others are the rest.

    Example: [bold]orthomerge convert a/ b/ --stats a.stats.safetensors
    --stats b.stats.safetensors --output converted/[/]

    Args:
        adapters: PEFT adapter folders or hub ids, in order.
        output: The folder to write; one below it for each of many.
        stats: Statistics of each adapter's task, in that order.
        others: Statistics of tasks other than those of the adapters; repeat.
        subspace: low_energy: move A to where its outputs are kept and the others' inputs have
            little effect; project: remove the others' dominant directions; start: the solver's.
        refit: What is kept: the own 'outputs', or the 'weights'.
        balance: low_energy: weight of the others against the own outputs.
        ridge: How far directions are trusted that the own sample hardly shows.
        energy_fraction: project: remove the directions that hold this part of the others' energy.
        subspace_dim: project: instead, keep A within so many best rows of the solver.
        solver: start, and project with --subspace-dim: a name of 'orthomerge list solvers'.
        recover: Steps of training after it, with A frozen or projected.
        task: With --recover: each adapter's task or file of rows, in order.
        learning_rate: With --recover.
        rows: With --recover: training rows.
        base: Base model; default the one that the adapters name.
        seed: Seed of ties and of the training.
        layers: A line for every layer.
    """
    from orthomerge.adapters import ConvertConfig, convert_adapters, read_adapter
    from orthomerge.io.files import atomic_path
    from orthomerge.io.outputs import require_apart, require_free

    given = {"balance": balance, "ridge": ridge, "energy_fraction": energy_fraction}
    config = ConvertConfig(
        subspace=subspace, refit=refit, solver=solver, subspace_dim=subspace_dim, seed=seed,
        options=parse_options(option or []),
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    if bool(recover) != bool(task):
        raise RecipeError("--recover STEPS and a --task for each adapter go together.")
    if task and len(task) != len(adapters):
        raise RecipeError(f"{len(task)} tasks for {len(adapters)} adapters: give one for each.")
    inputs = [*adapters, *(stats or ()), *(others or ()), *file_paths(task or ())]
    require_free(output, inputs=inputs, base=base, overwrite=overwrite)
    for adapter in adapters:
        require_apart(output, base=read_adapter(adapter, base=base).base_model)
    with atomic_path(output) as folder:
        with work_bar("layers") as progress:
            found = convert_adapters(
                list(adapters), folder, statistics=stats or [], others=others or [],
                config=config, base=base, progress=progress,
            )  # fmt: skip
        for item, name in zip(found, task or [], strict=bool(task)):
            _recover(item, name, recover, learning_rate, rows, base, seed)
    places = [output / item.path.relative_to(folder) for item in found]
    if json:
        print_json([_as_json(i, p) for i, p in zip(found, places, strict=True)])
        return
    _print(found, layers=layers)
    after = f", then {recover} steps of training" if recover else ""
    out.print(
        f"{output}: {len(found)} adapter{'' if len(found) == 1 else 's'} converted{after}. Merge "
        "them at a larger weight than before.",
        soft_wrap=True,
    )


def _recover(
    item: Converted,
    task: str,
    steps: int,
    learning_rate: float,
    rows: int,
    base: str | None,
    seed: int,
) -> None:
    """Train one converted adapter in its place."""
    from orthomerge.adapters import base_of, read_adapter
    from orthomerge.models.loading import load_classifier, load_tokenizer
    from orthomerge.tasks import get_task
    from orthomerge.training import TrainingSettings, recover_adapter

    about = get_task(task)
    read = read_adapter(item.path)
    found = base_of(read, base)
    data = about.data(train=rows, seed=seed)
    with work_bar(f"training {about.name}") as progress:
        recover_adapter(
            load_classifier(
                found.path_or_id,
                num_labels=about.outputs,
                regression=about.regression,
                name=found.name,
            ),
            item.path,
            data.train,
            load_tokenizer(found.path_or_id),
            regression=about.regression,
            settings=TrainingSettings(learning_rate=learning_rate, max_steps=steps),
            seed=seed,
            output=item.path,
            record={"task": about.name, "rows": rows, "seed": seed, "data": data.fingerprint},
            progress=progress,
        )


def _as_json(item: Converted, path: Path) -> dict[str, Any]:
    from orthomerge.adapters import described

    layers = {name: described(loss) for name, loss in item.layers.items()}
    return {
        "name": item.name, "path": str(path), "total": described(item.total), "layers": layers,
    }  # fmt: skip


def _print(found: Sequence[Converted], *, layers: bool) -> None:
    """What was lost by group of layers, or by layer, and in all."""
    lost = table(
        "adapter", "layers", "weights lost", "own outputs lost", "others hear", "before it was",
        title="what the conversion changed",
    )  # fmt: skip
    for item in found:
        for place, (name, loss) in enumerate(_lines(item.layers, layers=layers)):
            lost.add_row(item.name if place == 0 else "", name, *_figures(loss))
        lost.add_row("", "[bold]all[/]", *_figures(item.total), end_section=True)
    out.print(lost)


def _lines(losses: Mapping[str, Loss], *, layers: bool) -> list[tuple[str, Loss]]:
    """By layer, or by the last part of the layers' names (query, value)."""
    from orthomerge.adapters import total_loss

    if layers:
        return list(losses.items())
    groups: dict[str, list[Loss]] = {}
    for name, loss in losses.items():
        groups.setdefault(name.rsplit(".", 1)[-1], []).append(loss)
    return [(name, total_loss(items)) for name, items in groups.items()]


def _figures(loss: Loss) -> list[str]:
    """Shares; without own statistics what is left of what the others heard."""
    known = not math.isnan(loss.own)
    after, before = (loss.heard_after, loss.heard_before) if known else (loss.heard_still, 1.0)
    outputs = f"{loss.share_of_outputs:.1%}" if known else "–"
    return [f"{loss.share_of_weights:.1%}", outputs, f"{after:.2f}", f"{before:.2f}"]
