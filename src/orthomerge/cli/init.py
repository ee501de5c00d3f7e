"""`orthomerge init`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from orthomerge.cli._app import app, out, parse_numbers, parse_options, print_json
from orthomerge.cli._checks import check_inputs
from orthomerge.cli._options import Count, CountOrNone, Json, Output, Rate, SolverOptions

if TYPE_CHECKING:
    from orthomerge.adapters import OsrmConfig
    from orthomerge.models.assets import ResolvedModel
    from orthomerge.statistics import Statistics
    from orthomerge.subspace import Subspace


@app.command()
def init(
    model: str,
    others: Annotated[list[Path], typer.Option()],
    output: Output,
    own: Path | None = None,
    solver: str | None = None,
    option: SolverOptions = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    alpha: Rate = 16,
    constraint: str | None = None,
    strength: Annotated[float, typer.Option(min=0)] = 10.0,
    paper: Annotated[bool, typer.Option("--paper")] = False,
    energy_fraction: float = 0.9,
    subspace_dim: CountOrNone = None,
    weights: str | None = None,
    existing: list[Path] | None = None,
    low_energy: float | None = None,
    labels: Count = 2,
    task_type: str | None = None,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Start an adapter that does not disturb other tasks, from their statistics.

    By default A starts as PEFT draws it, and training is charged for what the update does to the
    other tasks' outputs (the constraint penalty). '--paper' starts A where the others' layer inputs
    have least energy.

    The folder is an ordinary PEFT adapter: load it with
    PeftModel.from_pretrained(model, folder, is_trainable=True) in any PEFT trainer. The constraint
    is carried out by 'orthomerge train', or by orthomerge.OsrmCallback.from_start(model, folder)
    in a Trainer of your own. With the constraint penalty the folder holds the others' statistics,
    taken together: treat it as you treat those.

    Example: [bold]orthomerge init minilm --others b.stats.safetensors --others
    c.stats.safetensors --own a.stats.safetensors --output start/[/]

    Args:
        model: Base model: a folder, a packaged id or a hub id.
        others: Statistics of another task; repeat.
        output: The adapter folder to write.
        own: Statistics of the own task.
        solver: How A is chosen: a name of 'orthomerge list solvers', or default for PEFT's own
            start, which goes with penalty; for project and freeze contrastive with --own, else
            min_eigen.
        constraint: What training obeys: init (nothing), freeze, project or penalty; default penalty
            without a solver, project for contrastive and joint, init for the others.
        strength: penalty: the weight in the loss of what the others would get.
        paper: The paper's start: min_eigen, and A trains freely.
        energy_fraction: project: exclude the directions that hold this part of the others' energy.
        subspace_dim: project: instead, keep A within so many best rows of the solver.
        weights: Importance of each --others, as 1,1,0.5; equal otherwise.
        existing: Adapter that is trained already and whose rows A avoids (joint); repeat.
        low_energy: Give layers ranks by how many directions have at most this part of the
            others' mean energy, as 0.1.
        labels: Classes of the head (1 for a regression).
        task_type: PEFT task type: SEQ_CLS, CAUSAL_LM or SEQ_2_SEQ_LM; default the one that the
            statistics are for, a classifier's or the language model's that the base is.
        seed: Seed of ties, and of the fresh head.
    """
    from orthomerge.errors import RecipeError
    from orthomerge.io.names import START
    from orthomerge.io.outputs import require_free

    inputs = [*others, *(existing or ()), own]
    check_inputs(existing or (), [*others, own])
    require_free(output, inputs=inputs, base=model, kind=START)
    if paper and (solver or constraint):
        raise RecipeError("--paper stands for a solver and a constraint: name neither beside it.")
    from orthomerge.adapters import OsrmConfig, settled
    from orthomerge.statistics import Statistics

    if paper:
        solver, constraint = OsrmConfig.solver, OsrmConfig.constraint
    read = [Statistics.load(p, lazy=True) for p in others]
    shares = parse_numbers(weights, "weights")
    config = settled(
        solver,
        constraint,
        own,
        granularity=read[0].meta.granularity,
        energy_fraction=energy_fraction,
        subspace_dim=subspace_dim,
        strength=strength,
        seed=seed,
        weights=None if shares is None else tuple(shares),
        options=parse_options(option or []),
    )
    shape = _Shape(rank, alpha, low_energy, labels, task_type)
    statistics = _Statistics(others, read, own, Statistics.load(own, lazy=True) if own else None)
    made = _make(model, shape, config, statistics, existing or [], output)
    if json:
        found = {"path": str(output), "captured": made.captured}
        ranks = {"ranks": made.ranks, "low_energy_directions": made.free} if made.free else {}
        print_json(found | ranks)
    else:
        for line in _said(made, rank, output):
            out.print(line, soft_wrap=True)


class _Shape(NamedTuple):
    """The adapter and the head of its task."""

    rank: int
    alpha: float
    low_energy: float | None
    labels: int
    task_type: str | None


class _Statistics(NamedTuple):
    """The files that were named, and what is in them."""

    others: list[Path]
    read: list[Statistics]
    own: Path | None
    mine: Statistics | None

    def check(self, found: ResolvedModel, model: str, task_type: str) -> None:
        """Refuse those of another base or form, and two that do not go together."""
        named = [*zip(self.others, self.read, strict=True)]
        named += [(self.own, self.mine)] if self.own and self.mine else []
        for path, item in named:
            item.require_model(found.sha256, model, name=f"'{path}'")
            item.require_form(task_type, name=f"'{path}'")
            item.require_match(self.read[0], mine=f"'{path}'", theirs=f"'{self.others[0]}'")


class _Made(NamedTuple):
    """A start as it was written: rows by layer, their energies, ranks where layers differ."""

    config: OsrmConfig
    layers: int
    chosen: Mapping[str, Subspace]
    captured: Mapping[str, Any]
    ranks: Mapping[str, int]
    free: Mapping[str, int]


def _make(
    model: str,
    shape: _Shape,
    config: OsrmConfig,
    statistics: _Statistics,
    existing: list[Path],
    output: Path,
) -> _Made:
    """Load the base, start an adapter on it, and write it."""
    from orthomerge import adapters
    from orthomerge.models.assets import resolve_model
    from orthomerge.models.loading import language_task_type, load_for
    from orthomerge.records import start_record

    found = resolve_model(model)
    trained = [adapters.read_adapter(p) for p in existing]
    trained = adapters.align_adapters(trained, base=found.path_or_id) if trained else []
    read, mine = statistics.read, statistics.mine
    words, kind = read[0].meta.form == "text", shape.task_type
    kind = kind or (language_task_type(found.path_or_id) if words else "SEQ_CLS")
    statistics.check(found, model, kind)
    ranks, free = ({}, {})
    if shape.low_energy is not None:
        ranks, free = adapters.plan_ranks(read, shape.rank, shape.low_energy, config.weights)
    base = load_for(
        found.path_or_id, kind, num_labels=shape.labels, seed=config.seed,
        name=found.name,
    )  # fmt: skip
    wrapped = adapters.new_lora(
        base, targets=read[0].meta.target_modules, rank=shape.rank, alpha=shape.alpha,
        task_type=kind, seed=config.seed, ranks=ranks,
    )  # fmt: skip
    started = adapters.start_adapter(wrapped, read, mine, config, existing=trained)
    energies = adapters.captured(started.chosen)
    record = start_record(
        config, base=found.name, base_sha256=found.sha256, others=statistics.others,
        own=statistics.own, existing=trained, low_energy=shape.low_energy, captured=energies,
        read_as={key: getattr((mine or read[0]).meta, key) for key in ("prompt", "max_length")},
    )  # fmt: skip
    adapters.save_start(wrapped, output, started.directions, charges=started.charges, record=record)
    layers = len(adapters.lora_layers(wrapped))
    return _Made(config, layers, started.chosen, energies, ranks, free)


def _said(made: _Made, rank: int, output: Path) -> Iterator[str]:
    """What is printed about a start."""
    from orthomerge.subspace import contrast

    config = made.config
    free, ranks = made.free, made.ranks
    crowded = [name for name, dims in free.items() if dims < rank]
    if crowded:
        yield (
            f"{len(crowded)} of {len(free)} layers have fewer than {rank} low-energy directions "
            f"(least: '{min(crowded, key=lambda n: free[n])}' with {min(free.values())}); ranks "
            f"go from {min(ranks.values())} to {max(ranks.values())}."
        )
    if made.chosen:
        yield _summary(output, config.solver, rank, made.chosen)
    else:
        yield f"{output}: {made.layers} layers, rank {rank}, PEFT's own start."
    silent = [name for name, found in made.chosen.items() if not found.total_other]
    if silent:
        yield (
            f"note: no token of the others reached {len(silent)} of the {len(made.chosen)} layers "
            f"('{silent[0]}'), so nothing is to be avoided there, and any rows are as good."
        )
    apart = contrast(made.chosen.values())
    if config.needs_own and apart is not None and apart < _ALIKE:
        yield (
            "note: the own statistics and the others' are alike, and no directions tell these "
            f"tasks apart: the start sees {apart:.2f} times as large a part of the own energy as "
            "of the others'; '--solver min_eigen' keeps out of both (docs/numerics.md)."
        )
    if config.constraint in _OBEYED:
        yield (
            f"constraint '{config.constraint}': {_OBEYED[config.constraint]}; train it with "
            "'orthomerge train', or with orthomerge.OsrmCallback.from_start in a Trainer of your "
            "own."
        )


_OBEYED = {
    "freeze": "A has to stay as it is",
    "project": "A has to stay out of the others' dominant directions",
    "penalty": "training is charged for what the update does to the others' outputs",
}

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
