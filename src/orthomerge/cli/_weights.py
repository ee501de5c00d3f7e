"""Weights of `orthomerge merge --tune`: found by statistics, or on validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from orthomerge.cli._app import err
from orthomerge.cli._progress import work_bar
from orthomerge.errors import MergeError, unknown_name

WAYS = ("statistics", "validation")


class Search(NamedTuple):
    """What the command line says about the search."""

    way: str | None
    tasks: list[str]
    trials: int
    rows: int


def tuned_weights(
    adapters: list[str], output: Path, search: Search, how: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """What the search changes of how adapters are merged: the weights, at least.

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
    if how["weights"] is not None or how["layer_weights"]:
        raise MergeError("--tune finds the weights: leave out --weights and --layer-weights.")
    if search.way == "statistics":
        return _by_statistics(adapters, output, search, how, options)
    return _by_validation(adapters, output, search, how, options)


def _by_statistics(
    adapters: list[str], output: Path, search: Search, how: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """The common weight of least predicted shift; statistics go on to methods that need them."""
    from orthomerge.adapters import matched_fisher, of_one_model, read_adapter
    from orthomerge.adapters.write import require_free
    from orthomerge.diagnostics import best_weight
    from orthomerge.merging import get_method

    if search.tasks:
        raise MergeError("--task goes with --tune validation: statistics need no labelled rows.")
    if not how["statistics"]:
        raise MergeError(
            "--tune statistics needs the statistics of each adapter's task: give one --stats for "
            "each, in order ('orthomerge stats')."
        )
    require_free(output, overwrite=how["overwrite"])
    read = [read_adapter(a, base=how["base"]) for a in adapters]
    method = get_method(how["method"])
    stats = of_one_model(how["statistics"], read, how["base"])
    with work_bar("trial merges") as progress:
        best = best_weight(
            read, stats, method=method.name, seed=how["seed"], rank=how["rank"],
            fisher=matched_fisher(method, how["fisher"], read), options=options,
            progress=progress,
        )  # fmt: skip
    err.print(
        f"weight {best.weight:.3f}: predicted shift {best.shift.mean:.3f}, "
        f"{best.untuned.mean:.3f} at weight 1",
        highlight=False,
    )
    kept = stats if "moments" in method.needs or method.open_options else None
    return {"weights": best.weight, "statistics": kept}


def _by_validation(
    adapters: list[str], output: Path, search: Search, how: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """The weights that a search finds; its study lies beside the output."""
    from orthomerge.adapters.write import require_free
    from orthomerge.cli.tune import finish, merge_method, tune_validation
    from orthomerge.tuning import SearchSettings, read_inputs, require_optuna

    if not search.tasks:
        raise MergeError("--tune validation needs rows to score: one --task for each adapter.")
    require_optuna()
    require_free(output, overwrite=how["overwrite"])
    inputs = read_inputs(
        [Path(a) for a in adapters], search.tasks, base=how["base"], rows=search.rows
    )
    method = merge_method(
        inputs, how["method"], options, how["rank"], how["seed"], how["statistics"], how["fisher"],
        how["base"],
    )  # fmt: skip
    study = output.with_name(output.name + ".tune")
    tuned = tune_validation(
        inputs, study, method, SearchSettings(trials=search.trials, seed=how["seed"])
    )
    page = finish(tuned, inputs, study)
    err.print(f"weights {', '.join(f'{w:.3f}' for w in tuned.weights)}; trials: {page}")
    return {"weights": tuned.weights, "layer_weights": tuned.layer_weights}
