"""Tables of texts in files: what tasks and statistics are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError, reason
from orthomerge.io.documents import parse_json

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""What the name of a table ends in."""


def read_table(path: Path, error: type[OrthomergeError]) -> Any:
    """The table as a pandas frame; an empty cell is missing, the word "NA" is a text.

    Raises:
        error: no such file, no table by its name, or one that cannot be read as its name says.
    """
    import pandas as pd

    if path.suffix not in SUFFIXES:
        raise error(f"'{path}' is no table: its name must end in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise error(f"there is no file '{path}': check the path.")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".json":
            return pd.read_json(path)
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")
            return pd.DataFrame([parse_json(line) for line in lines if line.strip()])
        return pd.read_csv(
            path,
            sep="\t" if path.suffix == ".tsv" else ",",
            keep_default_na=False,
            na_values=[""],
        )
    except (ValueError, OSError, UnicodeError) as problem:
        raise error(f"'{path}' cannot be read as {path.suffix}: {reason(problem)}.") from problem
