"""Options that several verbs have, with one wording."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

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
        help="Cut every layer to this rank; 'full' cuts nothing. Default 'sum': dense updates, as "
        "ties gives them, are cut to the sum of the adapters' ranks."
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


def file_paths(named: Iterable[str]) -> list[Path]:
    """Those of some tasks or data sets that are files, not names."""
    return [path for path in map(Path, named) if path.is_file()]
