"""Weights of `orthomerge merge --tune`: found by statistics, or on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orthomerge.cli._app import err
from orthomerge.cli._options import file_paths
from orthomerge.cli._progress import work_bar
from orthomerge.errors import MergeError, unknown_name

if TYPE_CHECKING:
    from orthomerge.merging import MergeConfig
    from orthomerge.statistics import Statistics

WAYS = ("statistics", "validation")


class Search(NamedTuple):
    """What the command line says about the search."""

    way: str | None
    tasks: list[str]
    trials: int
    rows: int
    overwrite: bool


def tuned_weights(
    adapters: list[str],
    output: Path,
    search: Search,
    config: MergeConfig,
    statistics: list[Path] | None,
    fisher: list[Path] | None,
) -> tuple[MergeConfig, Sequence[Path | Statistics] | None]:
    """The merge with the weights that the search finds, and the statistics that it still needs.

    Raises:
        MergeError: what does not go together.
        OrthomergeError: what the search itself raises.
    """
    if search.way is None:
        raise MergeError("--task names the rows that --tune validation scores: give it, too.")
    if search.way == "entropy":
        raise MergeError(
            "weights by entropy are another command's: use 'orthomerge tune --objective entropy'."
        )
    if search.way not in WAYS:
        raise unknown_name("way", search.way, WAYS, where="--tune", error=MergeError)
    if config.weights is not None or config.layer_weights:
        raise MergeError("--tune finds the weights: leave out --weights and --layer-weights.")
    if search.way == "statistics":
        return _by_statistics(adapters, output, search, config, statistics, fisher)
    return _by_validation(adapters, output, search, config, statistics, fisher), statistics


def _by_statistics(
    adapters: list[str],
    output: Path,
    search: Search,
    config: MergeConfig,
    statistics: list[Path] | None,
    fisher: list[Path] | None,
) -> tuple[MergeConfig, list[Statistics] | None]:
    """The common weight of least predicted shift; statistics go on to methods that need them."""
    from orthomerge.adapters import align_adapters, of_one_model, read_adapter, read_needed
    from orthomerge.diagnostics import best_weight
    from orthomerge.io.outputs import require_free

    if search.tasks:
        raise MergeError("--task goes with --tune validation: statistics need no labelled rows.")
    if not statistics:
        raise MergeError(
            "--tune statistics needs the statistics of each adapter's task: give one --stats for "
            "each, in order ('orthomerge stats')."
        )
    inputs = [*adapters, *statistics, *(fisher or ())]
    require_free(output, inputs=inputs, base=config.base, overwrite=search.overwrite)
    read = align_adapters([read_adapter(a, base=config.base) for a in adapters], base=config.base)
    stats = of_one_model(statistics, read, config.base)
    needed = read_needed(config, read, fisher=fisher)
    with work_bar("trial merges") as progress:
        best = best_weight(read, stats, config, fisher=needed.fisher, progress=progress)
    err.print(
        f"weight {best.weight:.3f}: predicted shift {best.shift.mean:.3f}, "
        f"{best.untuned.mean:.3f} at weight 1",
        highlight=False,
    )
    return replace(config, weights=best.weight), stats if "moments" in config.needs else None


def _by_validation(
    adapters: list[str],
    output: Path,
    search: Search,
    config: MergeConfig,
    statistics: list[Path] | None,
    fisher: list[Path] | None,
) -> MergeConfig:
    """The weights that a search finds; its study is next to the output."""
    from orthomerge.cli.tune import finish, merge_method, tune_validation
    from orthomerge.io.outputs import require_free, require_resumable
    from orthomerge.tuning import SearchSettings, read_inputs, require_optuna
    from orthomerge.tuning.study import STUDY

    if not search.tasks:
        raise MergeError("--tune validation needs rows to score: one --task for each adapter.")
    require_optuna()
    files = [*adapters, *(statistics or ()), *(fisher or ()), *file_paths(search.tasks)]
    require_free(output, inputs=files, base=config.base, overwrite=search.overwrite)
    study = output.with_name(output.name + ".tune")
    require_resumable(study, (STUDY,), "study", inputs=files, base=config.base)
    inputs = read_inputs(
        [Path(a) for a in adapters], search.tasks, base=config.base, rows=search.rows
    )
    method = merge_method(inputs, config, statistics, fisher)
    tuned = tune_validation(
        inputs, study, method, SearchSettings(trials=search.trials, seed=config.seed)
    )
    page = finish(tuned, inputs, study)
    err.print(f"weights {', '.join(f'{w:.3f}' for w in tuned.weights)}; trials: {page}")
    return replace(config, weights=tuned.weights, layer_weights=tuned.layer_weights)
