"""The code blocks of the documents, and the note in a comment before a block."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
SHELL = ("", "bash")

# A reason why a block is not run: `<!-- not run: needs the hub -->` on the line before it.
_NOTE = re.compile(r"<!-- not run: (?P<reason>.+) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language, its text, and why it is not run, if so."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command line of a shell block, lines joined, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    found: list[Block] = []
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start, before = None, ""
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            if start is None and line.strip():
                before = line
            continue
        if start is None:
            start = number
            continue
        note = _NOTE.fullmatch(before.strip())
        text = "\n".join(lines[start + 1 : number]) + "\n"
        reason = note["reason"] if note else None
        found.append(Block(page, start + 1, lines[start][3:].strip(), text, reason))
        start, before = None, ""
    assert start is None, f"{page}: the block at line {start} has no end"
    return found
