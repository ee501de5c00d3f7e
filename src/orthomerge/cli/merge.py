"""`orthomerge merge`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthomerge.cli._app import app, out, parse_numbers, parse_options, print_json
from orthomerge.cli._checks import check_inputs, check_output
from orthomerge.cli._options import (
    Count,
    Energy,
    Json,
    MaxError,
    MethodOptions,
    Output,
    Overwrite,
    Rank,
    kept_energy,
    parse_rank,
)
from orthomerge.cli._progress import Quiet, work_bar
from orthomerge.cli._weights import Search, tuned_weights
from orthomerge.errors import MergeError, RecipeError, unknown_name

if TYPE_CHECKING:
    from orthomerge.merging import MergeConfig

SAVE_AS = ("adapter", "full")


@app.command()
def merge(
    output: Output,
    adapters: Annotated[list[str] | None, typer.Argument()] = None,
    method: str | None = None,
    mergekit: Path | None = None,
    weights: str | None = None,
    layer_weights: list[str] | None = None,
    option: MethodOptions = None,
    rank: Rank = None,
    energy: Energy = None,
    max_error: MaxError = None,
    heads: str = "keep",
    stats: list[Path] | None = None,
    fisher: list[Path] | None = None,
    base: str | None = None,
    save_as: str = "adapter",
    max_shard_size: str | None = None,
    requantize: Annotated[bool, typer.Option("--requantize")] = False,
    tune: str | None = None,
    task: list[str] | None = None,
    trials: Count = 50,
    rows: Count = 100,
    seed: int = 0,
    workers: Count = 1,
    device: list[str] | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge LoRA adapters of one base model into one adapter, straight from their factors.

    Example: [bold]orthomerge merge a/ b/ c/ --method ties --option density=0.2 --output merged/[/]

    Args:
        output: The folder to write.
        adapters: PEFT adapter folders or hub ids (org/name, org/name@rev), in order.
        method: A name of 'orthomerge list methods'; default linear.
        mergekit: A mergekit configuration that names adapters ('base+adapter'), method, weights and
            parameters instead.
        weights: Comma-separated, one per adapter (1,1,0.5 or =-1,1), or one for all. Default: 1/√N
            for a sum of adapters trained the usual way; 1 where they were made to be summed, and
            for methods that average.
        layer_weights: Weights of the layers a regular expression finds, as 'layer.[0-5].=0.5' or
            'query=1,0.5'; repeat, the first that finds a layer decides.
        heads: Task heads: 'keep' apart by task, 'average' into the result, 'refuse'.
        stats: Statistics of each adapter's task, in order, for methods that need moments.
        fisher: Fisher file of each adapter, in order, for methods that need it.
        base: The base model, for DoRA and where adapters call it by several names; default what
            they name.
        save_as: 'adapter', or 'full': the base model with the merge, in safetensors.
        max_shard_size: With --save-as full: size of a file, as 5GB; default the base's files.
        requantize: With --save-as full: quantize the merge as bitsandbytes quantized the base, and
            say what that costs; without it a quantized base gives a model in 16 bits.
        tune: 'statistics': find the common weight that the tasks' --stats predict to shift their
            outputs least, without labels. Weights by labelled rows: 'orthomerge tune'.
        seed: For methods that draw.
        workers: Number of layers merged in parallel.
        device: Device that takes layers, as cuda:0; repeat.
    """
    if save_as not in SAVE_AS:
        raise unknown_name("form", save_as, SAVE_AS, where="--save-as", error=MergeError)
    adapters, options = list(adapters or []), parse_options(option or [])
    check_inputs(adapters, stats, fisher)
    inputs = [*adapters, *(stats or ()), *(fisher or ())]
    check_output(output, inputs, base, overwrite=overwrite)
    from orthomerge.merging import MergeConfig

    own: dict[str, Any] = {
        "rank": parse_rank(rank), "energy": kept_energy(energy, max_error), "seed": seed,
        "heads": heads, "base": base,
    }  # fmt: skip
    if mergekit is not None:
        if adapters or method or weights or layer_weights or options or tune or task:
            raise MergeError(
                "--mergekit names adapters, method, weights and parameters in its file: leave them "
                "out of the command."
            )
        adapters, config = _from_mergekit(mergekit)
        config = MergeConfig.of(config, **own)
    elif not adapters:
        raise MergeError("there is nothing to merge: name adapters, or a file with --mergekit.")
    else:
        config = MergeConfig.of(
            method=method, weights=_weights(weights, "weights"),
            layer_weights=_layer_weights(layer_weights or []), options=options, **own,
        )  # fmt: skip
    given: dict[str, Any] = {"statistics": stats, "fisher": fisher}
    if tune is not None or task:
        search = Search(tune, task or [], trials, rows, overwrite)
        config, given["statistics"] = tuned_weights(adapters, output, search, config, **given)
    given["overwrite"] = overwrite
    if save_as == "full":
        given |= {"max_shard_size": max_shard_size, "requantize": requantize}
        _write_model(adapters, output, config, given, as_json=json)
    elif max_shard_size is not None:
        raise MergeError("--max-shard-size goes with --save-as full: an adapter is one file.")
    elif requantize:
        raise MergeError("--requantize goes with --save-as full: an adapter is not quantized.")
    else:
        given |= {"workers": workers, "devices": device or ()}
        _write_adapter(adapters, output, config, given, as_json=json)


def _write_adapter(
    adapters: list[str], output: Path, config: MergeConfig, how: dict[str, Any], *, as_json: bool
) -> None:
    """Write the merge as an adapter."""
    from orthomerge.adapters import merge_adapters

    with work_bar("layers") as progress:
        merged = merge_adapters(adapters, config, output=output, progress=progress, **how)
    about = _say_why(output, as_json=as_json)
    layers: Any = merged.layers
    highest = max(factors.rank for factors in layers.values())
    if as_json:
        print_json(
            {"path": str(output), "method": config.method, "layers": len(layers), "rank": highest,
             "truncation_error": dict(merged.truncation_error), "tasks": len(merged.tasks), **about}
        )  # fmt: skip
        return
    own = f", and each task's own under {output / 'tasks'}" if merged.tasks else ""
    out.print(
        f"{output}: {len(adapters)} adapters, {len(layers)} layers, method {config.method}, rank "
        f"{highest}{_cut(merged.truncation_error, config)}{own}.",
        soft_wrap=True,
    )


def _cut(errors: Mapping[str, float], config: MergeConfig) -> str:
    """What the rank took, where it took anything worth saying."""
    worst = max(errors.values(), default=0.0)
    if worst <= 0.0005:
        return ""
    why = " (the adapters' ranks added; --rank full cuts nothing)" if config.rank is None else ""
    return f"{why}; at most {worst:.1%} of a layer was cut by the rank"


def _from_mergekit(file: Path) -> tuple[list[str], MergeConfig]:
    """What a mergekit configuration says: adapters, and what is asked of their merge."""
    from orthomerge.cli._app import err
    from orthomerge.mergekit import read_mergekit

    plan = read_mergekit(file)
    for note in plan.notes:
        err.print(f"note: {note}.", highlight=False, markup=False, soft_wrap=True)
    return plan.adapters, plan.config


def _write_model(
    adapters: list[str],
    output: Path,
    config: MergeConfig,
    how: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Write the merge into its base model."""
    from orthomerge.adapters import merge_to_model

    with work_bar("layers") as progress:
        errors = merge_to_model(adapters, output, config, progress=progress, **how)
    about = _say_why(output, as_json=as_json)
    files = sorted(p.name for p in output.glob("*.safetensors"))
    if as_json:
        print_json({"path": str(output), "method": config.method, "files": files,
                    "truncation_error": errors, **about})  # fmt: skip
        return
    out.print(
        f"{output}: the base model with {len(adapters)} adapters merged, method {config.method}, "
        f"{len(files)} file{'' if len(files) == 1 else 's'}{_cut(errors, config)}"
        f"{_quantized(about)}.",
        soft_wrap=True,
    )


def _quantized(about: Mapping[str, Any]) -> str:
    """What quantizing the merge took, where it was."""
    lost: dict[str, float] = about.get("quantization_error", {})
    if not lost:
        return ""
    return f"; quantizing took at most {max(lost.values()):.1%} of a layer's weights"


def _say_why(output: Path, *, as_json: bool) -> dict[str, Any]:
    """Say a default weight with its reason; returns what is said of the weights as JSON."""
    from orthomerge.cli._app import err
    from orthomerge.records import written_record

    record = written_record(output)
    reason = record.get("weights_reason")
    if reason and not as_json:
        text = f"note: weight {reason}; --weights decides otherwise."
        err.print(text, highlight=False, markup=False, soft_wrap=True)
    said = {key: record[key] for key in ("quantization_error",) if key in record}
    return {
        "weights": [a["weight"] for a in record["adapters"]], "weights_reason": reason, **said,
    }  # fmt: skip


def _weights(text: str | None, what: str) -> list[float] | float | None:
    numbers = parse_numbers(text, what)
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers


def _layer_weights(pairs: list[str]) -> dict[str, list[float] | float]:
    """`REGEX=numbers`, the numbers after the last equals sign."""
    found: dict[str, list[float] | float] = {}
    for pair in pairs:
        expression, equals, numbers = pair.rpartition("=")
        if not equals or not expression:
            raise RecipeError(f"layer weights '{pair}' are not REGEX=NUMBERS, as in 'query=1,0.5'.")
        values = _weights(numbers, f"the weights of '{expression}',")
        assert values is not None
        if expression in found:
            raise RecipeError(f"layer weights for '{expression}' are given twice: keep one.")
        found[expression] = values
    return found
