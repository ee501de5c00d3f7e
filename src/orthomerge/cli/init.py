"""`orthomerge init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthomerge.cli._app import app, out, parse_options, print_json


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Base model: a folder, a packaged id or a hub id.")],
    others: Annotated[list[Path], typer.Option(help="Statistics of another task; repeat.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter folder to write.")],
    own: Annotated[Path | None, typer.Option(help="Statistics of the own task.")] = None,
    solver: Annotated[str, typer.Option(help="How A is chosen.")] = "min_eigen",
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the solver, key=value; repeat.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    alpha: Annotated[float, typer.Option(min=1e-9)] = 16,
    labels: Annotated[
        int, typer.Option(min=1, help="Classes of the head (1 for a regression).")
    ] = 2,
    task_type: Annotated[
        str, typer.Option(help="PEFT task type: SEQ_CLS or CAUSAL_LM.")
    ] = "SEQ_CLS",
    seed: Annotated[int, typer.Option(help="Seed of ties, and of the fresh head.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Start an adapter where the other tasks' layer inputs have least energy.

    The folder is an ordinary PEFT adapter: load it with
    PeftModel.from_pretrained(model, folder, is_trainable=True) in any PEFT trainer.

    Example: [bold]orthomerge init minilm --others b.stats.safetensors --others
    c.stats.safetensors --own a.stats.safetensors --output start/[/]
    """
    from orthomerge.adapters import OsrmConfig, captured, initialize_osrm_weights, new_lora
    from orthomerge.adapters import save_start as save
    from orthomerge.assets import resolve_model
    from orthomerge.errors import SubspaceError
    from orthomerge.features import Statistics
    from orthomerge.models import load_for

    read = [Statistics.load(p) for p in others]
    mine = Statistics.load(own) if own is not None else None
    options = parse_options(option or [])
    config = OsrmConfig(
        solver=solver, granularity=read[0].meta.granularity, seed=seed, options=options
    )
    for moment in read[0].moments.values():
        if rank > moment.dim:
            raise SubspaceError(
                f"rank {rank} is larger than the {moment.dim} inputs of the layers: lower --rank."
            )
    found = resolve_model(model)
    named = [*zip(others, read, strict=True), *([(own, mine)] if own and mine else [])]
    for path, item in named:
        item.require_model(found.sha256, model, name=f"'{path}'")
        item.require_match(read[0], mine=f"'{path}'", theirs=f"'{others[0]}'")
    base = load_for(found.path_or_id, task_type, num_labels=labels, seed=seed, name=found.name)
    wrapped = new_lora(
        base,
        targets=read[0].meta.target_modules,
        rank=rank,
        alpha=alpha,
        task_type=task_type,
        seed=seed,
    )
    chosen = initialize_osrm_weights(wrapped, read, mine, config)
    save(wrapped, output)
    energies = captured(chosen)
    if json:
        print_json({"path": str(output), "captured": energies})
        return
    total = sum(s.total_other for s in chosen.values())
    seen = sum(s.captured_other for s in chosen.values()) / total if total else 0.0
    width = next(iter(read[0].moments.values())).dim
    out.print(
        f"{output}: {len(energies)} layers, rank {rank}, start '{solver}'; it sees {seen:.1e} of "
        f"the others' energy, where random rows would see about {rank / width:.1e}.",
        soft_wrap=True,
    )
