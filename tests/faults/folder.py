"""What stands in a run's folder, and what of it must never be lost, changed or made again."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_recipe import untimed

ROWS, JOURNAL = "results.jsonl", "jobs.jsonl"
PIECES = ("stats", "starts", "adapters", "fisher")
TABLES = (ROWS, "interference.jsonl", "spectra.jsonl", "subspaces.jsonl", "training.jsonl")


class Stands:
    """Watches one run from sitting to sitting, against the rows that it must come to."""

    def __init__(self, rows: list[str]) -> None:
        self._right = set(rows)
        self._lines: set[str] = set()
        self._chunks: dict[str, tuple[int, int]] = {}
        self._journal = 0
        self.excused: set[str] = set()
        self._broken: set[str] = set()

    def moved(self, folder: Path) -> None:
        """The folder was copied: its files are others, and stand as before."""
        self._chunks = _chunks(folder)

    def look(self, folder: Path, *, damaged: bool) -> dict[str, list[str]]:
        """What is wrong after a sitting; a `damaged` folder may have lost what was damaged."""
        lines, chunks = _lines(folder / ROWS), _chunks(folder)
        found = {"wrong rows": [], "lost rows": [], "lost jobs": [], "jobs done again": []}
        for line in lines:
            if _untimed(line) not in self._right:
                found["wrong rows"].append(line)
        if not damaged:
            found["lost rows"] = sorted(self._lines - set(lines))
            found["lost jobs"] = [
                p for p, was in self._chunks.items()
                if chunks.get(p) != was and not any(p.startswith(b) for b in self._broken)
            ]  # fmt: skip
            found["jobs done again"] = self._again(folder)
        # A broken chunk stays until a whole one is in its place, which is then like the others.
        made = {p for p, (inode, _) in chunks.items() if self._chunks.get(p, (0, 0))[0] != inode}
        self._broken = {b for b in self._broken if not any(p.startswith(b) for p in made)}
        self._lines, self._chunks = set(lines), chunks
        self._journal = len(_lines(folder / JOURNAL))
        return {what: items for what, items in found.items() if items}

    def _again(self, folder: Path) -> list[str]:
        """Jobs of the last sitting that an earlier one had done and whose results stood."""
        events = [json.loads(line) for line in _lines(folder / JOURNAL)]
        done = {e["job"] for e in events[: self._journal] if e["event"] == "done"}
        done -= self.excused
        again = [e["job"] for e in events[self._journal :] if e["event"] == "began"]
        return [job for job in again if job in done]

    def excuse(self, folder: Path, file: Path) -> None:
        """What is done so far may have to be done again: a file of the folder is to be damaged."""
        name = file.relative_to(folder)
        whole = name.parts[0] in ("starts", "adapters")  # chunks of several files
        self._broken.add(f"{name.parent.as_posix()}/" if whole else name.as_posix())
        events = [json.loads(line) for line in _lines(folder / JOURNAL)]
        self.excused = {e["job"] for e in events if e["event"] == "done"}


def differences(folder: Path, plain: Path) -> list[str]:
    """How the tables of a finished run differ from those of the run nothing happened to."""
    found = []
    for name in TABLES:
        one, other = folder / name, plain / name
        if name == ROWS:
            if untimed(one) != untimed(other):
                found.append(f"{one} is not what {other} is")
        elif one.read_bytes() != other.read_bytes():
            found.append(f"{one} is not what {other} is")
    found += [f"{p} was left" for p in folder.rglob(".*") if ".part-" in p.name]
    return found


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; half a one at its end is nothing yet."""
    data = path.read_bytes() if path.is_file() else b""
    return data[: data.rfind(b"\n") + 1].decode("utf-8").splitlines()


def _untimed(line: str) -> str:
    return json.dumps({**json.loads(line), "seconds": None}, ensure_ascii=False)


def _chunks(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of a finished chunk, by its inode and the time it was written."""
    found = {}
    for kind in PIECES:
        for path in (folder / kind).rglob("*"):
            parts = path.relative_to(folder).parts
            if path.is_file() and not any(x.startswith(".") for x in parts):
                found["/".join(parts)] = path.stat().st_ino, path.stat().st_mtime_ns
    return found
