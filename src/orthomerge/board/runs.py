"""The runs below a folder, as the board lists them; only what is inside it is ever read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from orthomerge.errors import OrthomergeError, unknown_name
from orthomerge.io.documents import is_object, read_json
from orthomerge.io.rows import read_rows
from orthomerge.report import summarize
from orthomerge.report.source import ROWS, RUN
from orthomerge.report.summary import percent

# Runs lie in the folder or in folders of it, not deeper.
_DEPTH = 2


@dataclass(frozen=True)
class Listed:
    """One run as the list shows it; `best` is the best merge, its arm and its mean score × 100."""

    id: str
    name: str
    arms: list[str]
    rows: int
    expected: int | None
    best: str
    changed: str
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def inside(root: Path, name: str) -> Path:
    """The folder of the run called `name`, a path below `root`.

    Raises:
        UnknownNameError: no such run, or one that is outside `root`, also by a symbolic link.
    """
    root = root.resolve()
    found = [_id(root, folder) for folder in _folders(root)]
    if name not in found:
        raise unknown_name("run", name, found)
    return root / name


def is_inside(root: Path, path: Path) -> bool:
    """Whether a path, its links followed, lies below `root`."""
    return path.resolve().is_relative_to(root.resolve())


def list_runs(root: Path) -> list[Listed]:
    """Every run, the one that changed last first."""
    root = root.resolve()
    found = [(_stamp(folder), folder) for folder in _folders(root)]
    return [_listed(root, folder, stamp) for stamp, folder in sorted(found, reverse=True)]


def _folders(root: Path) -> Iterator[Path]:
    level = [root]
    for depth in range(_DEPTH + 1):
        for folder in level:
            rows = folder / ROWS
            if depth and rows.is_file() and is_inside(root, rows):
                yield folder
        level = [
            child
            for folder in level
            for child in sorted(folder.iterdir())
            if child.is_dir() and not child.name.startswith(".") and is_inside(root, child)
        ]


def _id(root: Path, folder: Path) -> str:
    return folder.relative_to(root).as_posix()


def _stamp(folder: Path) -> float:
    return (folder / ROWS).stat().st_mtime


@lru_cache(maxsize=256)
def _listed(root: Path, folder: Path, stamp: float) -> Listed:
    """What a run's files say; read again only when its rows have changed."""
    changed = datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    name = _id(root, folder)
    try:
        rows = read_rows(folder / ROWS)
    except OrthomergeError as problem:
        return Listed(name, folder.name, [], 0, None, "", changed, str(problem))
    record: Any = None
    if (folder / RUN).is_file() and is_inside(root, folder / RUN):
        try:
            record = read_json(folder / RUN)
        except ValueError:
            record = None
    record = record if is_object(record) else {}
    expected = record.get("expected_rows")
    summary = summarize(rows)
    scored = [
        (cell.score.mean, arm.name, column.label)
        for arm in summary.arms
        for column in summary.merges
        if (cell := summary.cell(arm, column)).score
    ]
    best = max(scored, default=None)
    return Listed(
        id=name,
        name=str(record.get("name") or folder.name),
        arms=[a.name for a in summary.arms],
        rows=len(rows),
        expected=expected if isinstance(expected, int) else None,
        best=f"{percent(best[0])} ({best[1]}, {best[2]})" if best else "",
        changed=changed,
    )
