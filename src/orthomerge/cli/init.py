"""`orthomerge init` and `orthomerge solvers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthomerge.cli._app import app, out, parse_numbers, parse_options, print_json

if TYPE_CHECKING:
    from orthomerge.subspace import Subspace


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Base model: a folder, a packaged id or a hub id.")],
    others: Annotated[list[Path], typer.Option(help="Statistics of another task; repeat.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter folder to write.")],
    own: Annotated[Path | None, typer.Option(help="Statistics of the own task.")] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="How A is chosen: a name of 'orthomerge solvers'; default contrastive with --own, "
            "min_eigen without."
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the solver, key=value; repeat.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    alpha: Annotated[float, typer.Option(min=1e-9)] = 16,
    constraint: Annotated[
        str | None,
        typer.Option(
            help="What training may do with A: init (anything), freeze, project; default project "
            "for contrastive and joint, init for the others."
        ),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's start: min_eigen, and A trains freely.")
    ] = False,
    share: Annotated[
        float, typer.Option(help="project: A stays out of what holds this share of their energy.")
    ] = 0.9,
    room: Annotated[
        int | None,
        typer.Option(min=1, help="project: instead, A stays within the solver's ROOM best rows."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Importance of each --others, as 1,1,0.5; equal otherwise.")
    ] = None,
    existing: Annotated[
        list[Path] | None,
        typer.Option(help="Adapter that is trained already, to keep clear of (joint); repeat."),
    ] = None,
    quiet_energy: Annotated[
        float | None,
        typer.Option(
            help="Ranks by room: a direction is quiet at this part of their mean energy, as 0.1."
        ),
    ] = None,
    labels: Annotated[
        int, typer.Option(min=1, help="Classes of the head (1 for a regression).")
    ] = 2,
    task_type: Annotated[
        str, typer.Option(help="PEFT task type: SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM.")
    ] = "SEQ_CLS",
    seed: Annotated[int, typer.Option(help="Seed of ties, and of the fresh head.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Start an adapter where the other tasks' layer inputs have least energy.

    The folder is an ordinary PEFT adapter: load it with
    PeftModel.from_pretrained(model, folder, is_trainable=True) in any PEFT trainer. The constraint
    is carried out by 'orthomerge train', or by orthomerge.Projection in a trainer of your own.

    Example: [bold]orthomerge init minilm --others b.stats.safetensors --others
    c.stats.safetensors --own a.stats.safetensors --output start/[/]
    """
    from orthomerge.adapters import (
        OsrmConfig,
        captured,
        initialize_osrm_weights,
        kept_out_directions,
        new_lora,
        plan_ranks,
        read_adapter,
        start_record,
    )
    from orthomerge.adapters import save_start as save
    from orthomerge.assets import resolve_model
    from orthomerge.errors import RecipeError
    from orthomerge.features import Statistics
    from orthomerge.models import load_for
    from orthomerge.subspace import contrast, get_solver

    if paper and (solver or constraint):
        raise RecipeError("--paper stands for a solver and a constraint: name neither beside it.")
    solver = "min_eigen" if paper or (solver is None and own is None) else solver or "contrastive"
    if constraint is None:
        constraint = "project" if get_solver(solver).needs_own else "init"
    read = [Statistics.load(p, lazy=True) for p in others]
    mine = Statistics.load(own, lazy=True) if own is not None else None
    trained = [read_adapter(p) for p in existing or []]
    shares = parse_numbers(weights, "weights")
    config = OsrmConfig(
        solver=solver,
        granularity=read[0].meta.granularity,
        constraint=constraint,
        share=share,
        room=room,
        seed=seed,
        weights=None if shares is None else tuple(shares),
        options=parse_options(option or []),
    )
    found = resolve_model(model)
    named = [*zip(others, read, strict=True), *([(own, mine)] if own and mine else [])]
    for path, item in named:
        item.require_model(found.sha256, model, name=f"'{path}'")
        item.require_form(task_type, name=f"'{path}'")
        item.require_match(read[0], mine=f"'{path}'", theirs=f"'{others[0]}'")
    ranks, free = (
        plan_ranks(read, rank, quiet_energy, shares) if quiet_energy is not None else ({}, {})
    )
    base = load_for(found.path_or_id, task_type, num_labels=labels, seed=seed, name=found.name)
    wrapped = new_lora(
        base,
        targets=read[0].meta.target_modules,
        rank=rank,
        alpha=alpha,
        task_type=task_type,
        seed=seed,
        ranks=ranks,
    )
    chosen = initialize_osrm_weights(wrapped, read, mine, config, existing=trained)
    kept_out = None
    if constraint == "project":
        kept_out = kept_out_directions(wrapped, read, mine, config, existing=trained)
    energies = captured(chosen)
    record = start_record(
        config,
        base=found.name,
        base_sha256=found.sha256,
        others=others,
        own=own,
        existing=trained,
        quiet_energy=quiet_energy,
        captured=energies,
    )
    save(wrapped, output, kept_out, record=record)
    if json:
        told = {"path": str(output), "captured": energies}
        print_json(told | ({"ranks": ranks, "quiet_directions": free} if free else {}))
        return
    crowded = [name for name, dims in free.items() if dims < rank]
    if crowded:
        out.print(
            f"{len(crowded)} of {len(free)} layers have fewer than {rank} quiet directions (least: "
            f"'{min(crowded, key=lambda n: free[n])}' with {min(free.values())}); ranks go from "
            f"{min(ranks.values())} to {max(ranks.values())}.",
            soft_wrap=True,
        )
    out.print(_summary(output, solver, rank, chosen), soft_wrap=True)
    apart = contrast(chosen.values())
    if get_solver(solver).needs_own and apart is not None and apart < _ALIKE:
        out.print(
            "note: the own statistics and the others' are alike, and no directions tell these "
            f"tasks apart: the start sees {apart:.2f} times as large a part of the own energy as "
            "of the others'; '--solver min_eigen' keeps out of both (docs/numerics.md).",
            soft_wrap=True,
        )
    if kept_out is not None:
        out.print(
            "A has to stay where it is quiet: train it with 'orthomerge train', or with "
            "orthomerge.Projection in a trainer of your own.",
            soft_wrap=True,
        )


# Below it a start that looks for what is its own has found nothing of the kind.
_ALIKE = 1.1


def _summary(output: Path, solver: str, rank: int, chosen: Mapping[str, Subspace]) -> str:
    """What the rows see of the others and of the own task, beside what random rows would see."""
    others = sum(s.captured_other for s in chosen.values())
    total = sum(s.total_other for s in chosen.values())
    drawn = sum(s.total_other * len(s.basis) / s.basis.shape[1] for s in chosen.values())
    seen, chance = (others / total, drawn / total) if total else (0.0, 0.0)
    text = (
        f"{output}: {len(chosen)} layers, rank {rank}, start '{solver}'; it sees {seen:.1e} of the "
        f"others' energy, where random rows would see about {chance:.1e}"
    )
    own = [s for s in chosen.values() if s.captured_own is not None and s.total_own]
    if own:
        mine = sum(s.captured_own or 0.0 for s in own) / sum(s.total_own or 0.0 for s in own)
        text += f", and {mine:.1e} of its own task's"
    return text + "."


@app.command()
def solvers(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """The ways to choose where an adapter starts, with their options."""
    from rich.table import Table

    from orthomerge.subspace import list_solvers

    found = list_solvers()
    if json:
        print_json(
            [
                {"name": s.name, "title": s.title, "paper": s.paper, "needs_own": s.needs_own,
                 "joint": s.joint, "options": dict(s.options)}
                for s in found
            ]
        )  # fmt: skip
        return
    table = Table(title="solvers")
    for column in ("solver", "what it chooses", "options", "source"):
        table.add_column(column, overflow="fold")
    for s in found:
        options = ", ".join(f"{k}={v}" for k, v in s.options.items())
        table.add_row(f"[bold]{s.name}[/]", s.title, options, s.paper)
    out.print(table)
