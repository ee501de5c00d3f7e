"""What a command refuses before anything slow is imported: a name misspelt costs no seconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from orthomerge.io.names import FISHER, STATISTICS
from orthomerge.io.outputs import require_free


def check_inputs(
    adapters: Iterable[str | Path] = (),
    statistics: Iterable[Path | None] | None = None,
    fisher: Iterable[Path] | None = None,
) -> None:
    """Refuse adapters and files that are not there.

    Raises:
        AdapterError, StatisticsError: the library's own, for the first of them.
    """
    from orthomerge.adapters import check_folders

    check_folders(adapters)
    for path in statistics or ():
        if path is not None:
            STATISTICS.require(path)
    for path in fisher or ():
        FISHER.require(path)


def check_output(
    output: Path, inputs: Iterable[str | Path], base: str | None, *, overwrite: bool
) -> None:
    """Refuse a folder that is not free; where an adapter is one file, the library looks.

    Raises:
        OutputError: the library's own.
    """
    if output.suffix != ".safetensors":
        require_free(output, inputs=inputs, base=base, overwrite=overwrite)
