"""Options that several verbs have, with one wording."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from orthomerge.errors import MergeError

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
TaskName = Annotated[
    str, typer.Option(help="A task of 'orthomerge list tasks', or a CSV, JSONL or Parquet file.")
]
Output = Annotated[Path, typer.Option("--output", "-o")]
Count = Annotated[int, typer.Option(min=1)]
"""A number of which there is at least one."""
Port = Annotated[int, typer.Option(min=1, max=65535)]
CountOrNone = Annotated[int | None, typer.Option(min=1)]
Rate = Annotated[float, typer.Option(min=1e-9)]
"""A number above zero."""
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that orthomerge wrote.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of a text or a prompt; default what the adapter was trained with, or 128.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="bf16 holds the frozen base in bfloat16, faster on processors made for it; adapters, "
        "heads and sums stay in float32 and float64. float32 leaves it as it is."
    ),
]
MethodOptions = Annotated[
    list[str] | None, typer.Option(help="Option of the method, key=value; repeat.")
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="Cut every layer to this rank; 'auto' to the least that keeps --energy; 'full' cuts "
        "nothing. Default 'sum': dense updates, as ties gives them, are cut to the sum of the "
        "adapters' ranks."
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        help="With --rank auto: the part of each layer's squared norm to keep; default 0.99."
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        help="With --rank auto: the part of each layer's norm to lose at most, in place of "
        "--energy; 0.1 is the energy 0.99."
    ),
]
SolverOptions = Annotated[
    list[str] | None, typer.Option(help="Option of the solver, key=value; repeat.")
]


def parse_rank(text: str | None) -> int | str | None:
    """A whole number, or a word, which `MergeConfig` knows or refuses."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return text


def kept_energy(energy: float | None, max_error: float | None) -> float | None:
    """The energy to keep, whichever of the two the user gave.

    Raises:
        MergeError: both, or an error that is no part of a norm.
    """
    if max_error is None:
        return energy
    if energy is not None or not 0 <= max_error < 1:
        raise MergeError(
            f"--max-error {max_error:g}: give a number from 0 to below 1, and no --energy with it."
        )
    return 1 - max_error**2


def file_paths(named: Iterable[str]) -> list[Path]:
    """Those of some tasks or data sets that are files, not names."""
    return [path for path in map(Path, named) if path.is_file()]
