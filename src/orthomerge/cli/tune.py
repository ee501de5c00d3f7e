"""`orthomerge tune`: merge weights found on data, and the merge that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthomerge.cli._app import app, out, parse_options, print_json, table
from orthomerge.cli._options import (
    Count,
    Energy,
    Json,
    MaxError,
    MethodOptions,
    Output,
    Rank,
    Rate,
    file_paths,
    kept_energy,
    parse_rank,
)
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.errors import MergeError, unknown_name
from orthomerge.io.outputs import require_apart, require_ours, require_resumable

if TYPE_CHECKING:
    from orthomerge.merging import MergeConfig
    from orthomerge.tuning import Inputs, Method, SearchSettings, Tuned

OBJECTIVES = ("validation", "entropy")


@app.command()
def tune(
    adapters: list[Path],
    task: Annotated[list[str], typer.Option()],
    output: Output,
    objective: str = "validation",
    method: str = "linear",
    option: MethodOptions = None,
    rank: Rank = None,
    energy: Energy = None,
    max_error: MaxError = None,
    stats: list[Path] | None = None,
    fisher: list[Path] | None = None,
    groups: Count = 1,
    layerwise: Annotated[bool, typer.Option("--layerwise")] = False,
    trials: Count = 50,
    low: float = 0.0,
    high: float = 1.5,
    steps: Count = 500,
    learning_rate: Rate = 1e-3,
    init: Annotated[float, typer.Option(min=0, max=1)] = 0.3,
    batch_size: Count = 16,
    rows: Count = 100,
    data_seed: int = 0,
    base: str | None = None,
    max_length: Count = 48,
    seed: int = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the weights of a merge on data, and merge with them; called again, go on.

    Writes weights.json, the merged adapter (merged/) and a page of the trials (trials.html).

    Examples: [bold]orthomerge tune a/ b/ --task sentiment --task topic --output tuned/[/]

    [bold]orthomerge tune a/ b/ --task sentiment --task topic --objective entropy --layerwise
    --output tuned/[/]

    Args:
        adapters: PEFT adapter folders with their heads.
        task: The task of each adapter, in order: a name or a file; repeat.
        output: Folder of the study and what comes of it.
        objective: validation (score on selection rows, searched) or entropy (of the predictions on
            their texts, by gradient: AdaMerging).
        method: A name of 'orthomerge list methods'.
        stats: Statistics of each task, for methods that need it.
        fisher: Fisher file of each adapter, for 'fisher'.
        groups: Cut the layers in depth, with weights of each group's own.
        layerwise: Entropy: coefficients of each layer's own.
        trials: Trials in all, those of an earlier run included.
        low: Lowest weight.
        high: Highest weight.
        steps: Entropy: steps of Adam.
        learning_rate: Entropy: of Adam.
        init: Entropy: first coefficient.
        batch_size: Entropy: rows per task and step.
        rows: Selection rows per task; never test rows.
        data_seed: Seed of the rows: that of training keeps them apart from it.
        base: Base model; default the adapters'.
        seed: Seed of the search and of methods that draw.
        overwrite: Entropy: replace what an earlier run wrote.
    """
    from orthomerge.merging import MergeConfig
    from orthomerge.tuning import (
        EntropySettings,
        SearchSettings,
        minimise_entropy,
        read_inputs,
        require_optuna,
    )

    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES, error=MergeError)
    entropy = objective == "entropy"
    if entropy:
        _only_sums(method, option, stats, fisher, rank or energy or max_error, groups)
    elif layerwise:
        raise MergeError("--layerwise goes with --objective entropy; for a search use --groups.")
    else:
        require_optuna()
    files = [*adapters, *(stats or ()), *(fisher or ()), *file_paths(task)]
    require_apart(output, files, base)
    _require_ours(output, entropy=entropy, overwrite=overwrite)
    config = MergeConfig(
        method, rank=parse_rank(rank), energy=kept_energy(energy, max_error), seed=seed,
        options=parse_options(option or []), base=base,
    )  # fmt: skip
    settings = SearchSettings(trials, groups, low, high, seed, max_length)
    inputs = read_inputs(adapters, task, base=base, rows=rows, data_seed=data_seed)
    require_apart(output, base=inputs.base.path_or_id)
    if entropy:
        with work_bar("entropy, steps") as progress:
            tuned = minimise_entropy(
                inputs,
                settings=EntropySettings(
                    steps, batch_size, learning_rate, init, layerwise, seed, max_length
                ),
                progress=progress,
            )
    else:
        how = merge_method(inputs, config, stats, fisher)
        tuned = tune_validation(inputs, output, how, settings)
    page = finish(tuned, inputs, output)
    if json:
        print_json({"path": str(output), "page": str(page), **tuned.record(inputs)})
        return
    _say(tuned, inputs, output)


def merge_method(
    inputs: Inputs,
    config: MergeConfig,
    statistics: Sequence[Path] | None = None,
    fisher: Sequence[Path] | None = None,
) -> Method:
    """The merge apart from its weights, its files read and held to belong to the adapters.

    They are held to it here, as in the merge itself, so that no trial is run in vain.
    """
    from orthomerge.adapters import read_needed
    from orthomerge.io.files import file_sha256
    from orthomerge.tuning import Method

    needed = read_needed(config, inputs.adapters, statistics, fisher)
    return Method(config, needed, [file_sha256(p) for p in [*(statistics or ()), *(fisher or ())]])


def tune_validation(
    inputs: Inputs, output: Path, method: Method, settings: SearchSettings
) -> Tuned:
    """Search the weights with a bar of the trials; `output` keeps the study.

    For `orthomerge merge --tune validation` as well: `tuned.weights` and `tuned.layer_weights` go
    into the merge as they are.
    """
    from orthomerge.tuning import search_weights

    with work_bar("trials") as progress:
        return search_weights(inputs, output, method=method, settings=settings, progress=progress)


def finish(tuned: Tuned, inputs: Inputs, output: Path) -> Path:
    """Write the merge, `weights.json` and the page of the trials; the page's path."""
    from orthomerge.report.trials import build_trials_page

    tuned.save(inputs, output)
    return build_trials_page(output)


def _only_sums(
    method: str,
    option: list[str] | None,
    stats: list[Path] | None,
    fisher: list[Path] | None,
    rank: str | float | None,
    groups: int,
) -> None:
    """Entropy is minimised over exact sums; what asks for something else is refused."""
    if method != "linear" or option or stats or fisher or rank is not None:
        raise MergeError(
            "--objective entropy finds the coefficients of the exact sum: leave out --method, "
            "--option, --rank, --stats and --fisher, or search with --objective validation."
        )
    if groups != 1:
        raise MergeError("--groups goes with --objective validation; for entropy use --layerwise.")


def _require_ours(output: Path, *, entropy: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else, before any work."""
    from orthomerge.tuning import MERGED, WEIGHTS
    from orthomerge.tuning.study import STUDY

    require_resumable(output, (WEIGHTS, STUDY) if entropy else (STUDY,), "study")
    if not output.is_dir():
        return
    if (output / MERGED).is_dir():
        require_ours(output / MERGED)
    study = (output / STUDY).is_file()
    if entropy and (study or ((output / WEIGHTS).is_file() and not overwrite)):
        remedy = "choose another --output" + ("" if study else ", or give --overwrite")
        raise MergeError(f"the output folder '{output}' is not empty: {remedy}.")


def _say(tuned: Tuned, inputs: Inputs, output: Path) -> None:
    entropy = tuned.objective == "entropy"
    mean = " (mean over layers)" if tuned.layer_weights else ""
    found = table("adapter", "task", "entropy" if entropy else "score", f"weight{mean}")
    for name, task, value, weight in zip(
        inputs.names, inputs.tasks, tuned.tasks, tuned.weights, strict=True
    ):
        found.add_row(name, task.task.name, f"{value:.4f}", f"{weight:.3f}")
    out.print(found)
    what = (
        f"mean entropy {tuned.value:.4f} nats after {tuned.best} steps"
        if entropy
        else f"mean score {tuned.value:.4f} at trial {tuned.best}, {len(tuned.trials)} tried"
    )
    out.print(f"{output}: {what}; merged/, weights.json, trials.html.", soft_wrap=True)
